"""Networks that people use, every convolution swapped, against the same networks by torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import convgen
from convgen.models.classes import Swapped

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("shared_cache")]


@pytest.fixture(autouse=True)
def _all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is chosen, whatever is faster."""
    monkeypatch.setattr("convgen.models.choices.rule", lambda *_: (True, "for the test"))


def results(run: Callable[[Tensor], Any], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and every gradient."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    output = run(x)
    output.square().mean().backward()
    named = {name: each.grad for name, each in model.named_parameters()}
    return {
        name: value.detach().clone().as_subclass(Tensor)
        for name, value in {"output": output, "x": x.grad, **named}.items()
        if value is not None
    }


def judge(
    model: nn.Module, shape: tuple[int, ...], run: Callable[[Tensor], Any] | None = None
) -> Tensor:
    """Swaps a network, compares all it computes, and swaps it back; its input."""
    torch.manual_seed(0)
    model = model.double()
    run = run or model
    x = torch.randn(shape, dtype=torch.float64)
    expected = results(run, model, x)
    classes = [type(module) for module in model.modules()]
    state = model.state_dict()
    report = convgen.swap(model)
    assert not report.left
    assert sum(isinstance(m, Swapped) for m in model.modules()) == len(report.swapped)
    model.load_state_dict(state)
    same(results(run, model, x), expected)
    convgen.unswap(model)
    assert [type(module) for module in model.modules()] == classes
    same(results(run, model, x), expected, exact=True)
    convgen.swap(model)
    return x


def same(found: dict[str, Tensor], expected: dict[str, Tensor], exact: bool = False) -> None:
    assert found.keys() == expected.keys()
    # A bias before a normalization has a gradient of rounding errors alone, and weight_norm one
    # that is orthogonal to the direction: what counts is the size of all of them.
    gradients = [value.abs().max() for name, value in expected.items() if name != "output"]
    scale = float(torch.stack(gradients).max())
    for name, value in found.items():
        size = scale if name != "output" else float(expected[name].abs().max())
        tolerance = 0.0 if exact else 1e-9 * size
        torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance, msg=name)


class TestMonai:
    def test_unet_and_its_meta_tensors(self) -> None:
        nets = pytest.importorskip("monai.networks.nets")
        model = nets.UNet(3, 1, 2, channels=(4, 6, 8), strides=(2, 2), num_res_units=1)
        x = judge(model, (2, 1, 16, 12, 8))
        meta = pytest.importorskip("monai.data").MetaTensor(x, affine=torch.eye(4))
        y = model(meta)
        assert type(y) is type(meta)
        assert torch.equal(y.as_tensor(), model(x))

    def test_dynunet_with_deep_supervision(self) -> None:
        nets = pytest.importorskip("monai.networks.nets")
        model = nets.DynUNet(
            3,
            1,
            2,
            kernel_size=[3, 3, 3, 3],
            strides=[1, 2, 2, 2],
            upsample_kernel_size=[2, 2, 2],
            filters=[4, 6, 8, 8],
            deep_supervision=True,
            deep_supr_num=1,
        )
        x = judge(model, (2, 1, 16, 16, 16))
        with torch.no_grad():  # it keeps what its heads have returned, which no copy may derive
            expected = model.eval()(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)

    def test_segresnet_compiled_and_exported(self) -> None:
        nets = pytest.importorskip("monai.networks.nets")
        model = nets.SegResNet(3, 8, 1, 2, blocks_down=(1, 1), blocks_up=(1,))
        x = judge(model, (1, 1, 8, 8, 8))
        model.eval()
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x))


class TestNnunet:
    def test_plain_conv_unet_which_registers_its_layers_twice(self) -> None:
        # Not in the extra `networks`: its package requires torchvision, which this does not need.
        unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
        model = unet.PlainConvUNet(
            input_channels=1,
            n_stages=3,
            features_per_stage=(4, 6, 8),
            conv_op=nn.Conv3d,
            kernel_sizes=3,
            strides=(1, 2, 2),
            n_conv_per_stage=1,
            num_classes=2,
            n_conv_per_stage_decoder=1,
            conv_bias=True,
            norm_op=nn.InstanceNorm3d,
            norm_op_kwargs={"affine": True},
            nonlin=nn.LeakyReLU,
        )
        judge(model, (2, 1, 16, 8, 12))


class TestTransformers:
    def test_encodec(self) -> None:
        transformers = pytest.importorskip("transformers")
        configuration = transformers.EncodecConfig(
            num_filters=2,
            hidden_size=8,
            upsampling_ratios=[3, 2],
            num_lstm_layers=1,
            codebook_size=16,
        )
        model = transformers.EncodecModel(configuration)
        judge(model, (2, 1, 96), lambda x: model.decoder(model.encoder(x)))

    def test_speecht5_hifigan(self) -> None:
        transformers = pytest.importorskip("transformers")
        configuration = transformers.SpeechT5HifiGanConfig(
            model_in_dim=6,
            upsample_initial_channel=16,
            upsample_rates=[4, 2],
            upsample_kernel_sizes=[8, 4],
            resblock_kernel_sizes=[3, 7],
            resblock_dilation_sizes=[[1, 3], [1, 3]],
            normalize_before=False,
        )
        model = transformers.SpeechT5HifiGan(configuration)
        judge(model, (2, 9, 6))
        model.apply_weight_norm()
        convgen.unswap(model)
        assert any(map(parametrize.is_parametrized, model.modules()))
        judge(model, (2, 9, 6))


class CausalConv3d(nn.Conv3d):
    """As the causal convolutions of video VAEs: time is padded in front, or given by a cache."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Any, **options: Any) -> None:
        super().__init__(in_channels, out_channels, kernel, **options)
        time, height, width = self.padding
        assert isinstance(time, int)
        self._padding = (width, width, height, height, 2 * time, 0)
        self.padding = (0, 0, 0)

    def forward(self, x: Tensor, cache: Tensor | None = None) -> Tensor:
        padding = list(self._padding)
        if cache is not None and padding[4] > 0:
            x = torch.cat((cache, x), 2)
            padding[4] -= cache.shape[2]
        return super().forward(nn.functional.pad(x, padding))


class Vae(nn.Module):
    """A causal 3-D VAE of one level: two frames and 2 x 2 pixels for one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            [
                CausalConv3d(3, 4, 3, padding=1),
                CausalConv3d(4, 8, (3, 3, 3), stride=(2, 2, 2), padding=1),
            ]
        )
        self.to_moments = nn.Conv3d(8, 8, 1)
        self.decoder = nn.ModuleList(
            [CausalConv3d(4, 8, 3, padding=1), CausalConv3d(4, 3, 3, padding=1)]
        )
        self.up = nn.ConvTranspose3d(8, 4, (1, 2, 2), stride=(1, 2, 2))
        self.in_time = CausalConv3d(4, 8, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder[1](nn.functional.silu(self.encoder[0](x)))
        mean, variance = self.to_moments(y).chunk(2, 1)
        z = mean + torch.tanh(variance)
        z = self.up(nn.functional.silu(self.decoder[0](z)))
        z = self.in_time(z).unflatten(1, (2, 4)).movedim(1, 3).flatten(2, 3)
        result: Tensor = self.decoder[1](z, z[:, :, :1].detach())
        return result


def test_a_causal_vae() -> None:
    model = Vae()
    x = judge(model, (1, 3, 4, 8, 8))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
