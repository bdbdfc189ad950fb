"""FLOPs of training, and their share of what a GPU can do."""

import bench
import pytest
import torch

import ae
import dit
import train_ae


def test_gflops_are_those_of_the_paper_s_models():
    with torch.device("meta"):  # where nothing is computed
        vmae = ae.VMAE()
        b = dit.DiT_models["DiT-B/1"](input_size=32, in_channels=16, num_classes=1000)
    # VMAE: 40% of the tokens in the encoder, all of them in the decoder
    assert 26 < train_ae.gflops(vmae, torch.zeros(1, 3, 256, 256)) < 27
    x, t, y = torch.zeros(1, 16, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    assert abs(train_ae.gflops(b, x, t, y) - 212.7) < 0.5
    # The backward pass has two products for each one of the forward pass
    assert abs(bench.dit_training_flops(b) / 1e9 - 3 * 212.7) < 1.5


def test_mfu_is_the_model_s_flops_over_the_gpu_s_peak(monkeypatch, capsys):
    for name, peak in (
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Tesla V100-SXM2-16GB", None),
    ):
        assert bench.peak_of(name) == peak

    def line_on(gpu, arithmetic):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
        line = {"work": "training", "ours": 250.0, "unit": "images/s"}
        line |= {"flops": 250.0 * 638e9, "arithmetic": arithmetic}
        bench.print_line(line, {arithmetic: 319e12})
        assert line["share"] == 0.5
        return line

    monkeypatch.setattr(bench, "CUDA", True)
    assert line_on("NVIDIA A100-SXM4-40GB", "bfloat16")["mfu"] == 250 * 638e9 / 312e12
    assert "50% of bfloat16, MFU 51%" in capsys.readouterr().out
    assert "mfu" not in line_on("NVIDIA A100-SXM4-40GB", "TF32")
    assert "mfu" not in line_on("Tesla V100-SXM2-16GB", "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("model, passes", [("vmae", 3), ("sdvae", 4)])
def test_flops_of_training_with_lpips_are_vgg_16_s_more(model, passes):
    vit = {"image_size": 32, "hidden_size": 32, "depth": 1, "decoder_depth": 1, "num_heads": 2}
    net = ae.MODELS[model](**(vit if model == "vmae" else {"channels": (32, 32)}))
    disc = ae.Discriminator() if model == "sdvae" else None
    without = bench.autoencoder_training_flops(net, 32, None, disc)
    flops = bench.autoencoder_training_flops(net, 32, bench.random_lpips(), disc)
    # VGG16 has 15.3 GMAC at 224 pixels. Two passes forward and one backward, to the reconstruction;
    # SD-VAE's adaptive weight asks for the gradient once more
    vgg = 2 * 15.3e9 * (32 / 224) ** 2
    assert abs(flops - without - passes * vgg) < 0.1 * vgg
