"""lmms-eval asks, visiontok answers as in its own evaluation: ``lmms-eval --model visiontok --model_args …``.

The whole recipe is in the model arguments, which are part of the key of lmms-eval's response cache.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from visiontok.api import compress
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.named import Loaded, find_device, load_model, quiet

from ..items import Item
from ..request import KEYS, Given, asked_recipe, conversation, cut
from ..runner import Answer, Block, answer

LONGEST = 1024  # tokens of an answer where a task says nothing
_GREEDY: Mapping[str, tuple[Any, ...]] = {"temperature": (0, None), "do_sample": (False, None), "num_beams": (1, None)}
_WITHOUT_EFFECT = ("top_p", "top_k", "seed", "num_return_sequences", "use_cache")  # of greedy decoding


class Visiontok(lmms):
    """A chat model of lmms-eval.

    Args:
        pretrained: Hugging Face id or folder, or an embedded model.
        method: name of a method, or ``full`` for the stock model.
        keep: budget, as on the command line.
        options: of the method, as JSON.
        seed: of the method's draws.
        recipe: JSON, instead of the four before it.
        batch_size: questions that are answered together.
        device: where; of several processes, each has its own.

    Raises:
        ConfigError: for an argument that is missing, wrong or unknown.
    """

    is_simple = False

    def __init__(
        self, pretrained: str = "", batch_size: int | str = 1, device: str | None = None, **arguments: Any
    ) -> None:
        super().__init__()
        if not pretrained:
            raise ConfigError("pretrained: is missing; give pretrained=ID_OR_FOLDER in --model_args")
        for name, value in arguments.items():
            if name not in KEYS:
                known = ", ".join(("pretrained", "batch_size", "device", *KEYS))
                raise ConfigError(f"{name}={value!r}: this model has no such argument; it has {known}")
        if "keep" in arguments:  # lmms-eval makes numbers of what looks like one
            arguments["keep"] = str(arguments["keep"])
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"batch_size={batch_size!r}: give a whole number from 1")
        self.recipe = asked_recipe(arguments, files=True)
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self._place(device)
        with quiet():
            self.loaded: Loaded | None = load_model(str(pretrained), self.device)
        with self._attached():  # what the model has against the recipe is said before questions are read
            pass

    def _place(self, device: str | None) -> torch.device:
        if self.accelerator.num_processes == 1:
            return find_device(device or "auto")
        own = self.accelerator.device
        if device not in (None, "auto", own.type, str(own)):
            raise ConfigError(
                f"device={device!r}: of {self.accelerator.num_processes} processes this one has {own}; leave device "
                "out (`accelerate launch --cpu` takes no accelerator)"
            )
        return torch.device(own)

    @property
    def _model(self) -> Loaded:
        if self.loaded is None:
            raise ConfigError("visiontok: lmms-eval has cleaned this model up; make another")
        return self.loaded

    def _attached(self) -> Any:
        return contextlib.nullcontext() if self.recipe is None else compress(self._model.model, self.recipe)

    def clean(self) -> None:
        """Free the model; called when all is answered."""
        self.loaded = None
        super().clean()

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers, in the order of the requests; questions that follow each other in the same terms go together."""
        found: list[GenerationResult] = []
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="visiontok")
        with quiet(), self._attached() as compression, torch.inference_mode():
            for terms, same in itertools.groupby(requests, key=lambda one: json.dumps(one.args[2], sort_keys=True)):
                longest, stops = _terms(json.loads(terms))
                for part in _batches(list(same), self.batch_size):
                    items = [self._item(number, request) for number, request in enumerate(part)]
                    answers = answer(Block(self._model, items), compression, longest)
                    found += [_result(item, one, stops) for item, one in zip(items, answers, strict=True)]
                    bar.update(len(part))
        bar.close()
        return found

    def _item(self, number: int, request: Instance) -> Item:
        """The question; ``number`` makes its id unique, for padding and repeats ask one twice."""
        _, to_messages, _, doc_id, task, split = request.args
        name = f"{task} {split} {doc_id}"
        turns = []
        for message in ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id])).messages:
            parts: list[Any] = []
            for part in message.content:
                if part.type not in ("text", "image"):
                    raise UnsupportedError(f"{name}: has {part.type}; visiontok answers about text and pictures here")
                parts.append(part.text if part.type == "text" else Given(name, part.url))
            turns.append((message.role, parts))
        images, prompt = conversation(turns)
        return Item(f"{name} {number}", images, prompt, target={}, cluster=name, groups={})

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise UnsupportedError(
            "loglikelihood: visiontok answers in words only; choose the task's variant with output_type generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise UnsupportedError("generate_until_multi_round: visiontok answers single rounds only; choose another task")


def _terms(given: Mapping[str, Any]) -> tuple[int, list[str]]:
    """The longest answer in tokens, and what ends one."""
    terms = dict(given)
    longest, stops = terms.pop("max_new_tokens", None), terms.pop("until", None) or []
    if longest is None:
        longest = LONGEST
    if isinstance(longest, bool) or not isinstance(longest, int) or longest < 1:
        raise ConfigError(f"max_new_tokens={longest!r}: give a whole number from 1")
    for name, value in terms.items():
        if name in _GREEDY:
            if value not in _GREEDY[name]:
                raise ConfigError(f"{name}={value!r}: visiontok decodes greedily; leave it out, or change --gen_kwargs")
        elif name not in _WITHOUT_EFFECT:
            raise ConfigError(f"{name}={value!r}: visiontok knows no such generation argument; leave it out")
    return longest, [stops] if isinstance(stops, str) else list(stops)


def _batches(requests: list[Instance], size: int) -> list[list[Instance]]:
    return [requests[start : start + size] for start in range(0, len(requests), size)]


def _result(item: Item, found: Answer, stops: Sequence[str]) -> GenerationResult:
    if found.error is not None:
        raise ConfigError(f"{item.cluster}: {found.error}")
    counts = TokenCounts(input_tokens=found.prompt, output_tokens=found.tokens)
    return GenerationResult(cut(found.text, stops).strip(), counts)
