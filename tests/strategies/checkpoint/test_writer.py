"""Files are written with the checksums of what is in them, in the format's own order, with little memory beside."""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from pathlib import Path

import pytest
import torch
from drivetrain.strategies.checkpoint import layout, writer
from safetensors.torch import load_file
from torch import Tensor


@pytest.mark.parametrize("size", [0, writer._BIG])
def test_checksums_taken_beside_the_writing_are_those_of_the_file(size: int, tmp_path: Path) -> None:
    """Parts of all lengths, also across the chunks' ends. sha256 would be slower than a fast disk: small files have it."""
    data = torch.randint(0, 256, (3 * layout.CHUNK + 12_345,), dtype=torch.uint8)
    lengths = [1, 7, layout.CHUNK - 9, layout.CHUNK + 5, 0, 1000]
    lengths.append(len(data) - sum(lengths))
    entry = writer.write_bytes(tmp_path / "file", [writer.bytes_of(part) for part in data.split(lengths)], size)
    content = (tmp_path / "file").read_bytes()
    assert content == data.numpy().tobytes()
    chunks = [content[i : i + layout.CHUNK] for i in range(0, len(content), layout.CHUNK)]
    assert entry == {
        **({"sha256": hashlib.sha256(content).hexdigest()} if size < writer._BIG else {}),
        "bytes": len(content),
        "chunk": layout.CHUNK,
        "crc32": [zlib.crc32(chunk) for chunk in chunks],
    }


def test_a_write_that_fails_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    before = threading.active_count()
    with pytest.raises(OSError, match="No space left"):
        writer.TensorFile({"w": torch.zeros(writer._BIG)}).write(tmp_path / "file")
    assert threading.active_count() == before


def odd_tensors() -> dict[str, Tensor]:
    """Tensors whose memory is not in the order of the file."""
    x = torch.randn(6, 500, 40)
    return {
        "transposed": x.transpose(0, 2),
        "channels_last": torch.randn(2, 3, 40, 50).to(memory_format=torch.channels_last),
        "expanded": torch.randn(7, 1).expand(7, 5000),
        "strided": x[:, ::3, 1::2],
        "one_long_row": torch.randn(30_000, 1).t(),
        "0-d": torch.tensor(3.0),
        "empty": torch.zeros(3, 0),
        "half": torch.randn(300, 30).half().t(),
    }


def test_tensors_in_any_order_of_memory_are_written_in_that_of_the_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces: a copy of a whole tensor beside the training's own is never made."""
    monkeypatch.setattr(writer, "PIECE", 10_000)
    tensors = odd_tensors()
    writer.TensorFile(tensors).write(tmp_path / "file")
    back = load_file(tmp_path / "file")
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name
    for name in ("transposed", "channels_last", "strided", "half"):
        sizes = [len(piece) for piece in writer.pieces(tensors[name])]
        assert max(sizes) <= 10_000, name
        assert sum(sizes) == tensors[name].numel() * tensors[name].element_size()


def test_complex_numbers_are_written_as_they_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conjugate is a flag in torch, and a value on the disk."""
    monkeypatch.setattr(writer, "PIECE", 1000)
    x = torch.randn(300, 3, dtype=torch.complex64)
    for tensor in (x.conj(), x.conj().t(), x.conj().imag):
        data = torch.cat(list(writer.pieces(tensor)))
        expected = tensor.resolve_conj().resolve_neg().contiguous()
        assert torch.equal(data.view(expected.dtype).view(expected.shape), expected)
