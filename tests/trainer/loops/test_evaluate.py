"""validate, test and predict: every sample exactly once over all ranks, and the module as it was before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Callback, Trainer, TrainingModule
from drivetrain.strategies.errors import ConfigError
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "seed": 0}


def loader(samples: int = 5, batch: int = 2) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(float(samples)).reshape(-1, 1)), batch_size=batch)


class Values(TrainingModule):
    """Logs the mean of the samples; predicts their doubles."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).mean() * 1e-3

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("value", batch[0].mean())
        self.log("largest", batch[0].max(), reduce="max")
        self.log("total", batch[0].sum(), reduce="sum")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return (batch[0] * 2).flatten().tolist()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def evaluate_all(root: Path) -> dict[str, Any]:
    trainer = Trainer(**QUIET, root=root)
    found: dict[str, Any] = {}
    for samples in (1, 4, 5, 9):
        for method in ("validate", "test"):
            found[f"{method} {samples}"] = getattr(trainer, method)(Values(), loader(samples))
        found[f"predict {samples}"] = trainer.predict(Values(), loader(samples))
    found["list"] = trainer.validate(Values(), [loader(5), loader(3)])
    found["dict"] = trainer.validate(Values(), {"a": loader(5), "b": loader(3)})
    found["predict list"] = trainer.predict(Values(), [loader(2), loader(3)])
    found["shuffled"] = trainer.validate(
        Values(), DataLoader(TensorDataset(torch.arange(5.0).reshape(-1, 1)), batch_size=2, shuffle=True)
    )
    found["limited"] = Trainer(**QUIET, root=root, limit_val_batches=1).validate(Values(), loader(9))
    trainer.accelerator.end_training()
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_every_sample_counts_once(size: int, ranks: Any, tmp_path: Path) -> None:
    """5 samples on 2 ranks have the mean 2.0; with a padding sampler they would have 1.667."""
    results = ranks(size, evaluate_all, tmp_path)
    for found in results:
        for samples in (1, 4, 5, 9):
            expected = {"value": (samples - 1) / 2, "largest": samples - 1, "total": samples * (samples - 1) / 2}
            assert found[f"validate {samples}"] == [pytest.approx(expected)]
            assert found[f"test {samples}"] == [pytest.approx(expected)]
        assert found["list"][0]["value/dataloader_idx_0"] == 2.0
        assert found["list"][0]["value/dataloader_idx_1"] == 1.0
        assert found["dict"][0]["value/a"] == 2.0
        assert found["dict"][0]["total/b"] == 3.0
        assert found["shuffled"][0]["value"] == 2.0
        assert found["limited"][0]["value"] == (0.5 if size == 1 else 1.5)
    for samples in (1, 4, 5, 9):
        batches = [r[f"predict {samples}"] for r in results]
        rounds = [batch for together in zip(*(b + [[]] * 9 for b in batches), strict=False) for batch in together]
        assert [v for batch in rounds for v in batch] == [2.0 * i for i in range(samples)]
    if size == 1:
        assert results[0]["predict list"] == [[[0.0, 2.0]], [[0.0, 2.0], [4.0]]]


def test_an_evaluation_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    """Its modes, its weights, the gradient mode; under inference_mode, unless that is switched off."""
    modes: list[tuple[bool, bool]] = []

    class Looking(Values):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
            assert not self.training

    module = Looking()
    module.layer.eval()
    Trainer(**QUIET, root=tmp_path).validate(module, loader())
    Trainer(**QUIET, root=tmp_path, inference_mode=False).validate(module, loader(2))
    assert module.training
    assert not module.layer.training
    assert modes == [(True, False)] * 3 + [(False, False)]
    assert torch.is_grad_enabled()
    with pytest.raises(ConfigError, match="not attached to a Trainer"):
        module.trainer  # noqa: B018


def test_the_values_of_a_validation_in_fit_are_there_for_everyone(tmp_path: Path) -> None:
    """In trainer.metrics, for callbacks at on_validation_end, and in metrics.jsonl."""
    seen: list[float] = []

    class Looking(Callback):
        def on_validation_end(self, trainer: Any, module: Any) -> None:
            seen.append(trainer.metrics["value"])

    trainer = Trainer(**QUIET, root=tmp_path, max_epochs=2, num_sanity_val_steps=0, callbacks=Looking())
    trainer.fit(Values(), loader(), loader())
    assert seen == [2.0, 2.0]
    assert trainer.metrics["value"] == 2.0
    assert '"value":2.0' in (trainer.root / "metrics.jsonl").read_text().replace(" ", "")


def test_hooks_may_log_and_several_loaders_have_values_of_their_own(tmp_path: Path) -> None:
    class Epochs(Values):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("index", float(dataloader_idx))

        def on_validation_epoch_end(self) -> None:
            self.log("whole", 3.0)

    (found,) = Trainer(**QUIET, root=tmp_path).validate(Epochs(), [loader(), loader()])
    assert found == {"index/dataloader_idx_0": 0.0, "index/dataloader_idx_1": 1.0, "whole": 3.0}


def test_another_module_is_prepared_before_it_is_evaluated(tmp_path: Path) -> None:
    """In the precision of the run, after a fit of the first one."""
    dtypes: list[torch.dtype] = []

    class Looking(Values):
        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            dtypes.append(self.layer.weight.dtype)

    trainer = Trainer(**QUIET, root=tmp_path, max_epochs=1, precision="fp64")
    trainer.fit(Values(), loader())
    trainer.test(Looking(), loader())
    assert set(dtypes) == {torch.float64}


@pytest.mark.parametrize(
    ("method", "words"), [("validate", "no validation_step"), ("test", "no test_step"), ("predict", "no predict data")]
)
def test_what_is_missing_is_named(method: str, words: str, tmp_path: Path) -> None:
    class Nothing(TrainingModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

    data = None if method == "predict" else loader()
    with pytest.raises(ConfigError, match=words):
        getattr(Trainer(**QUIET, root=tmp_path), method)(Nothing(), data)


def batch_norm(root: Path) -> tuple[float, list[float]]:
    """BatchNorm's statistics differ between ranks while ddp trains; an evaluation uses rank 0's everywhere."""

    class Norm(Values):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.norm(self.layer(batch[0])).mean()

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("mean", self.norm.running_mean.mean())  # pyright: ignore[reportOptionalMemberAccess]

    module = Norm()
    trainer = Trainer(**QUIET, root=root, max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(module, loader(8), loader(4))
    means = trainer.accelerator.gather(module.norm.running_mean).tolist()
    value = trainer.metrics["mean"]
    trainer.accelerator.end_training()
    return value, means


def test_all_ranks_evaluate_with_the_same_statistics(ranks: Any, tmp_path: Path) -> None:
    for value, means in ranks(2, batch_norm, tmp_path):
        assert means[0] == means[1] == pytest.approx(value, rel=1e-6)
