"""LoRA files mean the same to diffusers, to sd-scripts' naming and to us: its own loader is the oracle."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny_lora
from finetune.errors import ConfigError
from finetune.lora_formats import SETTINGS, adapters_of, read_adapters, write_diffusers, write_kohya
from finetune.lora_loading import inject, load_into
from finetune.lora_names import check_kohya, kohya_names
from finetune.lora_proof import probe
from tiny_lora import adapted, base

torch.set_num_threads(1)

CASES = [
    ("sd15", {"target": "all", "lora_alpha": 5}),
    ("sdxl", {"target": "all", "lora_alpha": 5}),
    ("sd21", {"target": ["to_q", "proj_in"]}),
    ("sd15", {"target": ["to_q"], "lora_alpha": 3, "use_rslora": True}),
    ("sd15", {"target": ["to_q", "proj_in", "conv1"], "use_dora": True}),
]


def written(modules, folder):
    """The two files of the adapters in `modules`."""
    files = [folder / "diffusers.safetensors", folder / "kohya.safetensors"]
    write_diffusers(adapters_of(modules), files[0])
    write_kohya(adapters_of(modules), modules, files[1], {"ss_network_dim": "2"})
    return files


def largest_difference(one, other) -> float:
    assert one.keys() == other.keys()
    return max(float((one[part] - other[part]).abs().max()) for part in one)


@pytest.fixture(scope="module")
def sd15():
    """A base that nothing is put into."""
    return base("sd15")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Both files of one LoRA for SD 1.5 with alpha 4."""
    return written(adapted("sd15", lora_alpha=4), tmp_path_factory.mktemp("files"))


def by_us(layout, path):
    modules = base(layout)
    for part, adapter in read_adapters(path, modules).items():
        inject(modules[part], adapter)
    return probe(modules)


def by_diffusers(layout, path):
    pipeline = tiny_lora.pipeline(layout)
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    return probe({part: pipeline.components[part] for part in base(layout)})


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_files_are_what_is_in_memory(layout, kind, tmp_path):
    modules, plain = adapted(layout, **kind), base(layout)
    memory = probe(modules)
    assert all(float((memory[part] - output).abs().max()) > 0.1 for part, output in probe(plain).items())
    by_name, by_kohya = written(modules, tmp_path)
    for path in (by_name, by_kohya):
        for part, adapter in read_adapters(path, plain).items():
            own = adapters_of(modules)[part]
            assert adapter.tensors.keys() == own.tensors.keys()
            assert all(torch.equal(tensor, own.tensors[key]) for key, tensor in adapter.tensors.items())
            assert all(adapter.scale(layer) == pytest.approx(own.scale(layer), rel=1e-6) for layer in own.alphas)
    assert largest_difference(memory, by_us(layout, by_kohya)) == 0
    assert largest_difference(memory, by_diffusers(layout, by_name)) == 0
    # Of a DoRA in sd-scripts' naming diffusers drops the lengths, with a warning: our own reader proves such a file.
    assert (largest_difference(memory, by_diffusers(layout, by_kohya)) == 0) == ("use_dora" not in kind)


SDXL_NAMES = {  # as sd-scripts' files have them
    "conv_in": "lora_unet_input_blocks_0_0",
    "down_blocks.0.downsamplers.0.conv": "lora_unet_input_blocks_3_0_op",
    "down_blocks.1.resnets.0.conv_shortcut": "lora_unet_input_blocks_4_0_skip_connection",
    "down_blocks.1.attentions.0.proj_in": "lora_unet_input_blocks_4_1_proj_in",
    "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k":
        "lora_unet_input_blocks_5_1_transformer_blocks_0_attn2_to_k",
    "down_blocks.2.attentions.0.transformer_blocks.1.ff.net.0.proj":
        "lora_unet_input_blocks_7_1_transformer_blocks_1_ff_net_0_proj",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0":
        "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0",
    "mid_block.resnets.1.conv2": "lora_unet_middle_block_2_out_layers_3",
    "up_blocks.0.resnets.2.time_emb_proj": "lora_unet_output_blocks_2_0_emb_layers_1",
    "up_blocks.0.upsamplers.0.conv": "lora_unet_output_blocks_2_2_conv",
    "up_blocks.1.attentions.2.proj_out": "lora_unet_output_blocks_5_1_proj_out",
    "up_blocks.2.resnets.0.conv1": "lora_unet_output_blocks_6_0_in_layers_2",
    "add_embedding.linear_1": "lora_unet_label_emb_0_0",
    "conv_out": "lora_unet_out_2",
}  # fmt: skip


def test_names_of_sd_scripts():
    sdxl, sd15 = kohya_names(base("sdxl")), kohya_names(base("sd15"))
    assert {layer: sdxl["unet"][layer] for layer in SDXL_NAMES} == SDXL_NAMES
    query = "text_model_encoder_layers_0_self_attn_q_proj"
    assert sdxl["text_encoder"]["encoder.layers.0.self_attn.q_proj"] == f"lora_te1_{query}"
    assert sdxl["text_encoder_2"]["text_model.encoder.layers.0.self_attn.q_proj"] == f"lora_te2_{query}"
    assert sd15["text_encoder"]["encoder.layers.0.self_attn.q_proj"] == f"lora_te_{query}"
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert sd15["unet"][name] == f"lora_unet_{name.replace('.', '_')}"
    for named in (sdxl, sd15):
        every = [name for names in named.values() for name in names.values()]
        assert len(set(every)) == len(every)


def test_a_unet2dmodel_has_no_names_there():
    with pytest.raises(ConfigError, match="this UNet2DModel is none of them: set export.kohya to false"):
        check_kohya(UNet2DModel(block_out_channels=(4, 4), norm_num_groups=4, attention_head_dim=2,
                                down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2))  # fmt: skip


def test_kohyas_alpha_of_rslora_gives_the_same_scale(tmp_path):
    path = written(adapted("sd15", text=False, lora_alpha=3, use_rslora=True), tmp_path)[1]
    stored = load_file(path)
    alphas = {float(tensor) for key, tensor in stored.items() if key.endswith(".alpha")}
    assert alphas == {float(torch.tensor(3 / 2**0.5 * 2))}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "2" and SETTINGS not in metadata
    assert metadata["modelspec.hash_sha256"] == "0x" + metadata["sshs_model_hash"]
    content = path.read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(tensors).hexdigest()


def test_what_diffusers_scripts_write_is_read(tmp_path):
    """train_text_to_image_lora writes `to_q.lora.down`, of text encoders `lora_linear_layer`, and no alpha."""
    modules, stored = adapted("sd15", lora_alpha=2), {}
    for part, module in modules.items():
        old = convert_state_dict_to_diffusers(get_peft_model_state_dict(module, save_embedding_layers=False))
        stored |= {f"{part}.{'text_model.' * (part != 'unet')}{key}": tensor for key, tensor in old.items()}
    assert any("to_q.lora.down" in key for key in stored) and any("lora_linear_layer.up" in key for key in stored)
    save_file(stored, tmp_path / "old.safetensors")
    assert largest_difference(probe(modules), by_us("sd15", tmp_path / "old.safetensors")) == 0


def test_a_file_with_several_ranks_and_alphas_is_read(tmp_path):
    modules = base("sd15")
    patterns = {"alpha_pattern": {"mid_block.attentions.0.proj_in": 1.5}, "rank_pattern": {"conv_out": 3}}
    targets = ["conv_out", "mid_block.attentions.0.proj_in", "down_blocks.0.attentions.0.proj_in"]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=targets, **patterns), modules["unet"])
    tiny_lora.disturb(modules["unet"])
    for path in written({"unet": modules["unet"]}, tmp_path):
        assert torch.equal(by_us("sd15", path)["unet"], probe(modules)["unet"])


def changed(path, change):
    """The file with its tensors changed by `change`, metadata kept."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    stored = load_file(path)
    change(stored, metadata)
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, path, metadata=metadata)


def drop(ending):
    def change(stored, _):
        del stored[next(key for key in sorted(stored) if key.endswith(ending))]

    return change


def transpose(ending):
    def change(stored, _):
        key = next(key for key in sorted(stored) if key.endswith(ending))
        stored[key] = stored[key].T

    return change


def rename(stored, _):
    key = next(key for key in sorted(stored) if "to_q" in key)
    stored[key.replace("to_q", "to_x")] = stored.pop(key)


def another_kind(stored, _):
    stored["lora_unet_conv_in.hada_w1_a"] = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("which", "change", "found"),
    [
        (0, drop("lora_B.weight"), r"lora_B\.weight is missing"),
        (1, drop("lora_down.weight"), r"lora_A\.weight is missing"),
        (0, transpose("to_q.lora_A.weight"), r"to_q\.lora_A\.weight has the shape \[4, 2\].*asks for \[4, 4\]"),
        (1, transpose("to_q.lora_up.weight"), r"to_q\.lora_B\.weight has the shape"),
        (0, rename, r"1 of \d+ keys fit no layer of the model, such as unet.*to_x"),
        (1, rename, r"1 of \d+ keys fit no layer of the model, such as lora_unet.*to_x"),
        (1, another_kind, r"hada_w1_a.*no LoHa"),
    ],
)
def test_damage_is_found(which, change, found, files, sd15, tmp_path):
    path = Path(shutil.copy(files[which], tmp_path))
    assert read_adapters(path, sd15)
    changed(path, change)
    with pytest.raises(ConfigError, match=found):
        read_adapters(path, sd15)


def test_a_lora_of_another_architecture_is_refused(files, sd15, tmp_path):
    for path in files:
        with pytest.raises(ConfigError, match="keys fit no layer|has the shape"):
            read_adapters(path, base("sdxl"))
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        read_adapters(tmp_path / "no.safetensors", sd15)


def test_lengths_of_the_inputs_are_refused(sd15, tmp_path):
    """LyCORIS can decompose along the inputs, [1, in]; peft cannot."""
    path = written(adapted("sd15", text=False, use_dora=True), tmp_path)[1]

    def turn(stored, _):
        key = next(key for key in sorted(stored) if key.endswith("dora_scale"))
        stored[key] = stored[key].T

    changed(path, turn)
    with pytest.raises(ConfigError, match="a length of each input"):
        read_adapters(path, sd15)


@pytest.mark.parametrize("which", [0, 1])
def test_a_run_goes_on_from_a_file(which, tmp_path):
    before = adapted("sd15", lora_alpha=3, use_rslora=True)
    path = written(before, tmp_path)[which]
    after = adapted("sd15", lora_alpha=3, use_rslora=True, seed=2)
    assert largest_difference(probe(before), probe(after)) > 0.1
    live = [parameter for parameter in after["unet"].parameters() if parameter.requires_grad]
    assert load_into(after, path) == sum(len(adapter.tensors) for adapter in adapters_of(before).values())
    assert largest_difference(probe(before), probe(after)) == 0
    still = {id(parameter) for parameter in after["unet"].parameters()}
    assert live and all(id(parameter) in still and parameter.requires_grad for parameter in live)  # the optimizer's


@pytest.mark.parametrize(
    ("run", "found"),
    [
        ({"r": 3}, "set lora.rank to 2"),
        ({"lora_alpha": 5}, "set lora.alpha to 4"),
        ({"use_rslora": True, "lora_alpha": 4}, r"set lora.alpha to 2\.828"),
        ({"use_dora": True}, "set lora.use_dora to false"),
        ({"target": [*"abc", "to_q"]}, "set lora.target to what the file has"),
        ({"text": False}, "set train.train_text_encoder to true"),
    ],
)
def test_what_does_not_agree_names_its_setting(run, found, files):
    modules = adapted("sd15", **{"lora_alpha": 4, **run})
    before = {key: tensor.clone() for key, tensor in adapters_of(modules)["unet"].tensors.items()}
    with pytest.raises(ConfigError, match=found):
        load_into(modules, files[0])
    assert all(torch.equal(before[key], tensor) for key, tensor in adapters_of(modules)["unet"].tensors.items())


def test_a_text_encoder_that_the_file_lacks(tmp_path):
    path = written(adapted("sd15", text=False), tmp_path)[1]
    with pytest.raises(ConfigError, match=r"no LoRA of the text_encoder.*set train.train_text_encoder to false"):
        load_into(adapted("sd15"), path)


def test_a_wrong_alpha_in_the_settings_is_seen(files, tmp_path):
    path = Path(shutil.copy(files[0], tmp_path))

    def double(_, metadata):
        settings = json.loads(metadata[SETTINGS])
        metadata[SETTINGS] = json.dumps(settings | {"unet.lora_alpha": 2 * settings["unet.lora_alpha"]})

    before = by_us("sd15", path)
    changed(path, double)
    assert largest_difference(before, by_us("sd15", path)) > 0.01
