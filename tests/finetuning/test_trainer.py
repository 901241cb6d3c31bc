from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from transfercache.backbones.registry import Backbone, network_with_head
from transfercache.finetuning.batches import Batch
from transfercache.finetuning.groups import describe_groups
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.trainer import Trainer, build_trainer
from transfercache.randomness import derive_rng

CPU = torch.device("cpu")
LABELS = np.array([0, 1, 1, 0])


def _trainer(backbone: Backbone, *, compute: str = "fp32", **options: Any) -> Trainer:
    settings = FinetuneOptions(**{"batch_size": 4, "schedule": "constant", **options})
    network = network_with_head(backbone, 2, seed=0)
    groups = describe_groups(backbone, settings, n_classes=2)
    trainer = build_trainer(
        network, backbone, groups, prepare=torch.Tensor.float, options=settings, compute=compute, device=CPU
    )
    trainer.set_training()
    return trainer


def _batch(seed: int = 0) -> Batch:
    return Batch(np.array([7, 3, 5, 1]), np.random.default_rng(seed).normal(size=(4, 3, 32, 32)).astype(np.float32))


def _head(network: nn.Module) -> nn.Linear:
    head = network.get_submodule("fc")
    assert isinstance(head, nn.Linear)
    return head


def test_step__takes_any_inputs_that_the_network_takes(two_stages: Backbone) -> None:
    """The head alone trains, so that the features are a fixed function and the loss can be worked out beside."""
    trainer = _trainer(two_stages, unfreeze="none")
    batch = _batch()
    with torch.inference_mode():
        logits = network_with_head(two_stages, 2, seed=0)(torch.from_numpy(batch.inputs))
    loss, n_correct = trainer.step(batch, LABELS, epoch=1, progress=0.0).tolist()
    assert loss == pytest.approx(4 * cross_entropy(logits, torch.from_numpy(LABELS)).item(), rel=1e-5)
    assert n_correct == (logits.argmax(dim=1).numpy() == LABELS).sum()
    assert trainer.passes == 4


def test_step__adamw_is_torchs_with_decay_of_the_matrix_alone(two_stages: Backbone) -> None:
    trainer = _trainer(two_stages, unfreeze="none", optimizer="adamw", lr_head=0.01, weight_decay=0.5)
    expected = network_with_head(two_stages, 2, seed=0)
    head = _head(expected)
    optimizer = torch.optim.AdamW(
        [{"params": [head.weight], "weight_decay": 0.5}, {"params": [head.bias], "weight_decay": 0.0}], lr=0.01
    )
    for seed in range(3):
        trainer.step(_batch(seed), LABELS, epoch=1, progress=0.0)
        optimizer.zero_grad()
        cross_entropy(expected(torch.from_numpy(_batch(seed).inputs)), torch.from_numpy(LABELS)).backward()
        optimizer.step()
    for name, parameter in _head(trainer.network).named_parameters():
        torch.testing.assert_close(parameter, head.get_parameter(name), rtol=1e-5, atol=1e-7)


def test_step__label_smoothing_moves_a_share_of_each_label_to_all_classes(two_stages: Backbone) -> None:
    with torch.inference_mode():
        logits = network_with_head(two_stages, 2, seed=0)(torch.from_numpy(_batch().inputs))
    target = torch.nn.functional.one_hot(torch.from_numpy(LABELS)) * 0.8 + 0.1
    expected = -(target * logits.log_softmax(dim=1)).sum().item()
    trainer = _trainer(two_stages, unfreeze="none", label_smoothing=0.2)
    loss, _ = trainer.step(_batch(), LABELS, epoch=1, progress=0.0).tolist()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_step__mixup_mixes_each_image_and_label_with_the_one_before(two_stages: Backbone) -> None:
    trainer = _trainer(two_stages, unfreeze="none", mixup=0.4, seed=5)
    # Drawn by the epoch and the batch's first row, so that it is the same wherever a run was stopped.
    share = derive_rng(5, "mixup", 2, 7).beta(0.4, 0.4)
    inputs = torch.from_numpy(_batch().inputs)
    with torch.inference_mode():
        logits = network_with_head(two_stages, 2, seed=0)(share * inputs + (1 - share) * inputs[[3, 0, 1, 2]])
    target = torch.from_numpy(LABELS)
    losses = [4 * cross_entropy(logits, label).item() for label in (target, target[[3, 0, 1, 2]])]
    loss, n_correct = trainer.step(_batch(), LABELS, epoch=2, progress=0.0).tolist()
    assert loss == pytest.approx(share * losses[0] + (1 - share) * losses[1], rel=1e-5)
    heavier = LABELS if share >= 0.5 else LABELS[[3, 0, 1, 2]]
    assert n_correct == (logits.argmax(dim=1).numpy() == heavier).sum()


def test_kept__with_ema_is_the_moving_average_of_weights_and_buffers(two_stages: Backbone) -> None:
    trainer = _trainer(two_stages, ema=0.75, batch_norm="train", lr_backbone=0.1, lr_head=0.1)
    assert trainer.kept is not trainer.network
    expected: dict[str, torch.Tensor] = {}
    for seed in range(3):
        trainer.step(_batch(seed), LABELS, epoch=1, progress=0.0)
        for name, value in trainer.network.state_dict().items():
            if name in expected and value.is_floating_point():
                expected[name] = 0.75 * expected[name] + 0.25 * value
            elif name not in expected:
                expected[name] = value.clone()
    for name, value in trainer.kept.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    inputs = _batch().inputs
    with torch.inference_mode():
        logits = trainer.kept.eval()(torch.from_numpy(inputs)).double()
        last = trainer.network.eval()(torch.from_numpy(inputs)).double()
    assert torch.equal(trainer.forward_logits(inputs), logits)
    assert not torch.allclose(logits, last, rtol=1e-3)


def test_step__bf16_rounds_the_network_and_not_the_loss_or_the_weights(two_stages: Backbone) -> None:
    losses = {}
    for compute in ("fp32", "bf16"):
        trainer = _trainer(two_stages, compute=compute, unfreeze="stage2")
        loss, _ = trainer.step(_batch(), LABELS, epoch=1, progress=0.0).tolist()
        losses[compute] = loss
        assert {parameter.dtype for parameter in trainer.network.parameters()} == {torch.float32}
        exact = trainer.kept.eval()(torch.from_numpy(_batch().inputs)).double()
        torch.testing.assert_close(trainer.forward_logits(_batch().inputs), exact, rtol=1e-6, atol=1e-6)
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)
