"""Exports: what others load is what was exported, bit for bit where the precision allows it, or nothing is there."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from limbeck import cli
from limbeck import run as play
from limbeck.export import checks, export_model, gguf_model
from limbeck.export.cards import exported_card, front_matter
from limbeck.export.gguf_tokens import Vocabulary
from limbeck.export.modelfile import modelfile
from limbeck.models.gguf_architectures import require_known
from limbeck.models.loading import load_model
from limbeck.types import LimbeckError
from tests.models.tiny import save_tiny
from tests.tiny_pair import TinyPair, questions, write_model

FAMILIES = ("llama", "qwen2", "qwen3")
# Of four frequencies one is as it was, two lie between, one is divided by the factor.
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 70,
}


def calm(folder: Path, scale: float = 0.15) -> Path:
    """Weights so near 0 that rounding them moves logits little, as it does in trained models."""
    path = folder / "model.safetensors"
    weights = {name: w if "norm" in name else w * scale for name, w in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Padded heads, as real models have them."""
    root = tmp_path_factory.mktemp("models")
    return {family: calm(write_model(root / family, family=family, head_rows=320)) for family in FAMILIES}


def _tensor_bytes(file: Path) -> int:
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(str(file)).tensors)


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_the_source_bit_for_bit(models: dict[str, Path], family: str, tmp_path: Path) -> None:
    source = load_model(models[family])
    ids = source.tokenizer(" ".join(questions(3)))["input_ids"]
    for format in ("safetensors", "gguf"):
        done = export_model(str(models[family]), tmp_path / format, format=format)
        assert done.difference == 0 and done.dtype == "float32"
        back = load_model(done.file)
        assert torch.equal(logits(back.model, ids), logits(source.model, ids))
        assert back.tokenizer(questions(9))["input_ids"] == source.tokenizer(questions(9))["input_ids"]
        assert back.tokenizer.chat_template == source.tokenizer.chat_template
        for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(back.tokenizer, role) == getattr(source.tokenizer, role)
        assert back.model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("format", "dtype", "at_most"),
    [
        ("safetensors", "float16", 0.55),
        ("safetensors", "bfloat16", 0.55),
        ("gguf", "float16", 0.51),
        ("gguf", "bfloat16", 0.51),
        ("gguf", "q8_0", 0.28),
    ],
)
def test_smaller_is_smaller_and_near(
    models: dict[str, Path], format: str, dtype: str, at_most: float, tmp_path: Path
) -> None:
    done = export_model(str(models["llama"]), tmp_path / "out", format=format, dtype=dtype)
    assert 0 < done.difference <= done.bound == checks.BOUNDS[dtype]
    if format == "safetensors":
        stored = load_file(done.file / "model.safetensors")
        assert {str(weight.dtype) for weight in stored.values()} == {f"torch.{dtype}"}
        plain: Any = AutoModelForCausalLM.from_pretrained(done.file)
        assert plain.dtype == getattr(torch, dtype)
    weights = sum(w.numel() * 4 for w in load_file(models["llama"] / "model.safetensors").values())
    written = sum(path.stat().st_size for path in done.folder.glob("*.safetensors")) or _tensor_bytes(done.file)
    assert written < at_most * weights


def test_without_a_dtype_weights_stay_as_they_are_stored(models: dict[str, Path], tmp_path: Path) -> None:
    half = export_model(str(models["qwen2"]), tmp_path / "half", dtype="bfloat16")
    for format in ("safetensors", "gguf"):
        again = export_model(str(half.folder), tmp_path / format, format=format)
        assert (again.dtype, again.difference) == ("bfloat16", 0)
    whole = export_model(str(again.file), tmp_path / "from gguf")
    assert (whole.dtype, whole.difference) == ("float32", 0), "a GGUF file is a source, too"


def test_an_adapter_is_merged(models: dict[str, Path], tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = load_model(models["llama"])
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "down_proj"], init_lora_weights=False)
    config.base_model_name_or_path = str(models["llama"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted: Any = get_peft_model(base.model, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.mul_(0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = base.tokenizer(questions(1)[0])["input_ids"]
    expected = logits(adapted.eval(), ids)
    assert not torch.allclose(expected, logits(load_model(models["llama"]).model, ids), atol=1e-2)
    for format in ("safetensors", "gguf"):
        done = export_model(str(tmp_path / "adapter"), tmp_path / format, format=format)
        back = load_model(done.file).model
        assert not isinstance(back, PeftModel)
        torch.testing.assert_close(logits(back, ids), expected, rtol=1e-4, atol=1e-4)


def test_a_run_is_its_student_with_card_and_licence(
    tiny: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny.teacher / "LICENSE").write_text("Do what is right.\n", "utf-8")
    play(tiny.tree(tmp_path / "run", train={"max_steps": 2}))
    capsys.readouterr()
    cli.export(str(tmp_path / "run"), tmp_path / "plain")
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'plain'}\n"
    assert "logits differ by at most 0 of the largest one (bound 0.0001), token ids by none" in said.err
    student = load_file(tmp_path / "run/student/model.safetensors")
    exported = load_file(tmp_path / "plain/model.safetensors")
    assert student.keys() == exported.keys() and all(torch.equal(student[k], exported[k]) for k in student)
    assert (tmp_path / "plain/LICENSE").read_text("utf-8") == "Do what is right.\n"
    assert not (tmp_path / "plain/student.json").exists()
    card = ModelCard.load(tmp_path / "plain/README.md")
    assert card.data["eval_results"] and card.data["library_name"] == "transformers"
    assert "## This export\n\nfloat32 weights" in card.text and "from_pretrained" in card.text

    done = export_model(str(tmp_path / "run"), tmp_path / "file", format="gguf")
    assert done.file == tmp_path / "file/run-F32.gguf"
    card = ModelCard.load(tmp_path / "file/README.md")
    assert card.data["library_name"] == "gguf" and card.data["eval_results"]
    assert "llama-server -m run-F32.gguf" in card.text and "AutoModelForCausalLM" not in card.text
    assert {path.name for path in (tmp_path / "file").iterdir()} == {
        "README.md",
        "LICENSE",
        "Modelfile",
        "run-F32.gguf",
    }
    assert (tmp_path / "file/Modelfile").read_text("utf-8") == 'FROM ./run-F32.gguf\nPARAMETER stop "<|im_end|>"\n'


class TestRefusals:
    def refused(self, source: Path | str, out: Path, **options: Any) -> str:
        with pytest.raises(LimbeckError) as caught:
            export_model(str(source), out, **options)
        assert not out.exists() and not list(out.parent.glob(f".{out.name}*")), "nothing is left"
        return str(caught.value)

    def test_what_is_there_already(self, models: dict[str, Path], tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(LimbeckError, match="exists, expected a new folder"):
            export_model(str(models["llama"]), tmp_path / "out")

    def test_formats_and_precisions(self, models: dict[str, Path], tmp_path: Path) -> None:
        for options, said in (
            ({"format": "onnx"}, "expected safetensors or gguf"),
            ({"dtype": "q8_0"}, "float32, bfloat16, float16 for safetensors"),
            ({"format": "gguf", "dtype": "q2_k"}, "q8_0 for gguf"),
        ):
            assert said in self.refused(models["llama"], tmp_path / "out", **options)

    def test_models_that_gguf_cannot_say(self, models: dict[str, Path], tmp_path: Path) -> None:
        said = self.refused(save_tiny(tmp_path / "gpt2", "gpt2"), tmp_path / "out", format="gguf")
        assert "gpt2 models cannot be exported as GGUF, expected one of llama, qwen2, qwen3" in said
        config = json.loads((models["llama"] / "config.json").read_text("utf-8"))
        for change, what in (
            ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope type linear"),
            ({"model_type": "qwen3", "rope_parameters": LLAMA3, "head_dim": 128}, "qwen3 model has rope type llama3"),
            ({"attention_bias": True}, "biases"),
            ({"hidden_act": "gelu"}, "gelu activations"),
        ):
            from transformers import AutoConfig

            with pytest.raises(LimbeckError, match=what):
                require_known(AutoConfig.for_model(**(config | change)))

    def test_tokenizers_that_gguf_cannot_say(self, models: dict[str, Path], tmp_path: Path) -> None:
        said = self.refused(save_tiny(tmp_path / "words"), tmp_path / "out", format="gguf")
        assert "the tokenizer is WordLevel, expected byte-level BPE" in said
        folder = write_model(tmp_path / "odd")
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\d{1,4}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.save_pretrained(folder)
        said = self.refused(folder, tmp_path / "out", format="gguf")
        assert r"cuts text by \d{1,4} then gpt2" in said and "smollm" in said

    def test_an_unfinished_run(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/recipe.resolved.yaml").write_text("name: run\n", "utf-8")
        assert "has no finished student" in self.refused(tmp_path / "run", tmp_path / "out")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (b"a: &a [x]\nb: [*a, *a]\n", "anchors and aliases are not read"),
            (b"[" * 3_000, "not valid YAML"),
            (b"\xff", "not UTF-8"),
        ],
    )
    def test_a_run_with_a_hostile_recipe(self, models: dict[str, Path], tmp_path: Path, text: bytes, said: str) -> None:
        shutil.copytree(models["llama"], tmp_path / "run/student")
        (tmp_path / "run/recipe.resolved.yaml").write_bytes(text)
        assert said in self.refused(tmp_path / "run", tmp_path / "out")

    @pytest.mark.parametrize("dtype", ["float32", "q8_0"])
    def test_a_wrong_weight_is_noticed(
        self, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
    ) -> None:
        """Without the order of rows that llama.cpp's rope wants, the file would load and talk nonsense."""
        monkeypatch.setattr(gguf_model, "in_pairs", lambda weight, heads: weight)
        said = self.refused(models["llama"], tmp_path / "out", format="gguf", dtype=dtype)
        assert "the exported model's logits differ by" in said

    def test_wrong_ids_are_noticed(
        self, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = Vocabulary.write
        monkeypatch.setattr(Vocabulary, "write", lambda self, to: write(replace(self, merges=self.merges[:20]), to))
        assert "the exported tokenizer reads" in self.refused(models["llama"], tmp_path / "out", format="gguf")

    def test_damaged_weights(self, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "model")
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"][0] = float("nan")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        assert "NaN or infinite logits" in self.refused(folder, tmp_path / "out")


def test_cards() -> None:
    card = "---\nlicense: mit\nlibrary_name: transformers\n---\n\n# Name\n\n## Use\n\nold\n\n## Limits\n\n- one\n"
    once = exported_card(card, name="x", file="x.gguf", said="Said.")
    assert front_matter(once) == {"license": "mit", "library_name": "gguf"}
    assert "old" not in once and once.index("llama-server -m x.gguf") < once.index("## Limits") < once.index("Said.")
    again = exported_card(once, name="x", file="x.gguf", said="Said again.")
    assert "Said." not in again and again.count("## This export") == again.count("## Use") == 1
    bare = exported_card("", name="x\n# y", file=None, said="Said.")
    assert front_matter(bare)["library_name"] == "transformers" and "\n# x # y\n" in bare


def test_a_modelfile_holds_no_instruction_of_a_stranger() -> None:
    ends = ["<|end|>", "x\nADAPTER /etc/passwd", 'y" z', "\n", "", " ", "\x1b[2J"]
    assert modelfile("m.gguf", adapter="m-lora.gguf", ends=ends) == (
        'FROM ./m.gguf\nADAPTER ./m-lora.gguf\nPARAMETER stop "<|end|>"\n'
    )


def test_a_modelfile_stops_where_the_template_and_generation_do(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    for name, fields in (
        ("tokenizer_config", {"eos_token": "<|endoftext|>"}),
        ("generation_config", {"eos_token_id": [1]}),
    ):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | fields), "utf-8")
    export_model(str(folder), tmp_path / "out", format="gguf")
    stops = (tmp_path / "out/Modelfile").read_text("utf-8").splitlines()[1:]
    assert stops == [f'PARAMETER stop "{end}"' for end in ("<|endoftext|>", "<|im_end|>", "<|im_start|>")]


BOMB = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join(9 * [f'*a{i - 1}'])}]}}\n" for i in range(1, 12))


@pytest.mark.parametrize("front", [BOMB, "a: &a [*a]", *(f"a: {'[' * n}{']' * n}" for n in (60, 340, 490, 3000))])
def test_metadata_of_a_hostile_card_is_left_out(front: str) -> None:
    """Merged aliases that grow to 9 ** 11 keys, and lists that can be read but not written."""
    card = exported_card(f"---\n{front}\n---\n\n# Name\n", name="x", file=None, said="Said.")
    assert front_matter(card)["library_name"] == "transformers" and "\n# Name\n" in card and len(card) < 300


SERVE = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port, params.n_ctx = sys.argv[1], ["127.0.0.1"], 0, 256
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
if sys.argv[2:]:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = sys.argv[2], 1.0
    params.lora_adapters = [adapter]
server = xllamacpp.Server(params)
print("listening at", server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_cpp(file: Path, adapter: Path | None = None) -> Iterator[Any]:
    """Ask llama.cpp's own server, which reads the file by itself, with a LoRA adapter where there is one."""
    command = [sys.executable, "-c", SERVE, str(file), *([] if adapter is None else [str(adapter)])]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None and process.stdin is not None
    told = next((line for line in process.stdout if line.startswith("listening at")), None)
    assert told is not None, "llama.cpp does not load the file"

    def ask(path: str, **body: Any) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{told.split()[-1]}/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    try:
        yield ask
    finally:
        process.kill()
        process.wait(10)
        process.stdin.close()
        process.stdout.close()


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp comes with xllamacpp: extra dev")
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_reads_the_same_model(models: dict[str, Path], family: str, tmp_path: Path) -> None:
    source: Any = load_model(models[family])
    done = export_model(str(models[family]), tmp_path / "out", format="gguf")
    prompts = [source.tokenizer(text)["input_ids"] for text in questions(4)]
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    with llama_cpp(done.file) as ask:
        for text in checks.TEXTS:
            tokens = ask("tokenize", content=text, add_special=True, parse_special=True)["tokens"]
            assert tokens == source.tokenizer(text)["input_ids"], text
        same = 0
        for ids in prompts:
            expected = source.model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist()
            body = {"n_predict": 12, "temperature": 0.0, "return_tokens": True, "ignore_eos": False}
            got = ask("completion", prompt=ids, **body)["tokens"]
            stop = expected.index(2) if 2 in expected else 12
            same += got[:stop] == expected[:stop]
    assert same == len(prompts)


def with_rope(folder: Path, rope: dict[str, Any], window: int = 128) -> Path:
    path = folder / "config.json"
    told = json.loads(path.read_text("utf-8")) | {"rope_parameters": rope, "max_position_embeddings": window}
    path.write_text(json.dumps(told), "utf-8")
    return folder


def scaled_and_not(config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' own frequencies, with llama3's scaling and without."""
    size = config.hidden_size // config.num_attention_heads
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return scaled, 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2) / size)


def test_the_rope_of_llama_3_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = with_rope(write_model(tmp_path / "model"), LLAMA3)
    done = export_model(str(folder), tmp_path / "out", format="gguf")
    assert done.difference == 0
    (found,) = [tensor.data for tensor in GGUFReader(str(done.file)).tensors if tensor.name == "rope_freqs.weight"]
    source, back = load_model(folder), load_model(done.file)
    scaled, plain = scaled_and_not(source.model.config)
    divided = torch.tensor(found)
    assert divided.dtype == torch.float32 and divided[0] == 1 and divided[-1] == 8 and (divided[1:3] % 1 != 0).all()
    torch.testing.assert_close(divided, plain / scaled, rtol=1e-6, atol=0)
    assert back.model.config.rope_parameters == source.model.config.rope_parameters
    ids = list(range(3, 103))
    assert torch.equal(logits(back.model, ids), logits(source.model, ids))
    again = export_model(str(done.file), tmp_path / "again")
    assert load_model(again.file).model.config.rope_parameters == source.model.config.rope_parameters


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rope_of_files_by_others(factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's own converter writes the divisors alone: Meta's settings are known, and others are refused."""
    metas = LLAMA3 | {"rope_theta": 500_000.0, "factor": factor, "original_max_position_embeddings": 8192}
    monkeypatch.setattr(GGUFWriter, "add_float64", lambda self, key, value: None)
    folder = with_rope(write_model(tmp_path / "model", width=128), metas, window=16_384)
    done = export_model(str(folder), tmp_path / "out", format="gguf")
    assert done.difference == 0 and load_model(done.file).model.config.rope_parameters == metas
    with pytest.raises(LimbeckError, match=r"in another way than Llama 3\.1 and later; use the safetensors"):
        export_model(str(with_rope(folder, metas | {"high_freq_factor": 5.0})), tmp_path / "odd", format="gguf")


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp comes with xllamacpp: extra dev")
def test_llama_cpp_has_the_rope_of_llama_3(tmp_path: Path) -> None:
    folder = with_rope(write_model(tmp_path / "model"), LLAMA3)
    source: Any = load_model(folder)
    done = export_model(str(folder), tmp_path / "out", format="gguf")
    every = source.tokenizer(" ".join(questions()))["input_ids"]
    prompts = [every[start : start + 100] for start in (0, 30, 60)]
    assert min(map(len, prompts)) > LLAMA3["original_max_position_embeddings"]
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}

    def answers(model: Any) -> list[list[int]]:
        return [model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist() for ids in prompts]

    expected = answers(source.model)
    unscaled = with_rope(folder, {"rope_type": "default", "rope_theta": 100.0})
    assert answers(load_model(unscaled).model) != expected, "the scaling would not be seen"
    compared = 0
    with llama_cpp(done.file) as ask:
        for ids, wanted in zip(prompts, expected, strict=True):
            body = {"n_predict": 12, "temperature": 0.0, "return_tokens": True, "ignore_eos": False}
            got = ask("completion", prompt=ids, **body)["tokens"]
            stop = wanted.index(2) if 2 in wanted else 12
            assert got[:stop] == wanted[:stop]
            compared += stop
    assert compared > 12
