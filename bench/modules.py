r"""compress_module on real networks: what each rule and each way of solving costs.

    python bench/modules.py resnet --weights resnet20.safetensors --data cifar10-test-2000.npz
    python bench/modules.py minilm --weights all-minilm-l6-v2 --data calib/wiki.txt --held wikitext-2/wiki.valid.raw
    python bench/modules.py encoder --weights embeddinggemma-300m --data calib/wiki.txt --held wikitext-2/wiki.valid.raw
    python bench/modules.py whisper --weights whisper-tiny.en --data jfk.flac
    python bench/modules.py efficientnet --weights efficientnet-lite0/model.safetensors --data cifar10-test-2000.npz \
        --fine-bits 8

Every row is one rule solved in one way (--rules 4s,3a,50,2:4 --ways rtn,papers,ours,greedy); the dense model is
measured in the same run. A JSON object a row on stdout as it is done; the last line holds them all. Whisper needs
soundfile to read FLAC, which is no dependency of the package.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.core.rules import Grid, Joint, Pattern, Rule
from featherweight.core.solve import Choices
from featherweight.stream import norms
from featherweight.stream.feed import Feed, at_rest
from featherweight.stream.module import compress_module

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's


# ---- rules and ways -------------------------------------------------------------------------------------------------
def rule_of(text: str) -> Rule:
    """ "4s", "3a" (bits, symmetric or asymmetric, a scale a row), "50" (per cent zeros), "2:4", or two joined by +."""
    if "+" in text:
        pattern, grid = (rule_of(part) for part in text.split("+"))
        return Joint(grid, pattern)  # type: ignore[arg-type]
    if text[-1] in "sa":
        return Grid(float(text[:-1]), None, symmetric=text[-1] == "s")
    return Pattern.of_text(text if ":" in text else str(float(text) / 100))


def way_of(name: str, rule: Rule) -> tuple[Rule, Choices]:
    """How a rule is solved.

    rtn: rounding to nearest on min-max grids; magnitude pruning. papers: GPTQ (min-max grids, columns as they come,
    no descent after it); SparseGPT. ours: the defaults. greedy: OBQ on OBC's symmetric or asymmetric MSE grid and
    ExactOBS. mse: rounding to nearest on the MSE grid.
    """
    search = {"rtn": "minmax", "papers": "minmax", "greedy": "mse", "mse": "mse", "ours": "hessian"}[name]
    if isinstance(rule, Grid):
        rule = replace(rule, search=search)
    elif isinstance(rule, Joint):
        rule = replace(rule, grid=replace(rule.grid, search=search))
    choices = {
        "rtn": Choices(method="rtn"),
        "mse": Choices(method="rtn"),
        "papers": Choices(order="natural", refine=0, mask="sparsegpt", resolve=0),
        "ours": Choices(),
        "greedy": Choices(method="obq", refine=0, mask="obs", resolve=0),
    }
    return rule, choices[name]


@dataclass
class Task:
    """A dense module, its calibration batches, what is skipped, and how a compressed copy is measured."""

    module: nn.Module
    batches: list[Any]
    measure: Callable[[nn.Module], dict[str, float | str]]
    skip: list[str]
    fine: str | None = None  # layers for which --fine-bits says how many they get


# ---- CIFAR ResNets ---------------------------------------------------------------------------------------------------
class Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.stride, self.more = stride, outside - inside

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:  # option A: every other pixel, zeros for the new channels
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(x + y)


class ResNet(nn.Module):
    """6 n + 2 layers, widths 16, 32, 64."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for number, (inside, outside) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            blocks = [Block(outside if i else inside, outside, 1 if i or number == 1 else 2) for i in range(n)]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def cifar(path: Path) -> tuple[Tensor, Tensor]:
    """Images (normalised) and labels: 100 of each class in the first thousand, 100 in the second, each shuffled.

    The file is sorted by class. Batches of one class would make nonsense of batch statistics.
    """
    with np.load(path) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()
    order = torch.randperm(len(labels) // 2, generator=torch.Generator().manual_seed(0))
    mixed = torch.cat([2 * order, 2 * order + 1])
    scaled = (images[mixed].float() / 255 - MEAN) / STD
    return scaled.permute(0, 3, 1, 2).contiguous(), labels[mixed]


def logits_of(module: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(part) for part in images.split(100)])


def agreement(task_images: Tensor, dense: nn.Module, labels: Tensor | None) -> Callable[[nn.Module], dict[str, Any]]:
    reference = logits_of(dense, task_images)

    def measure(module: nn.Module) -> dict[str, Any]:
        logits = logits_of(module, task_images)
        kl = F.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="batchmean")
        found = {"agreement": 100 * float((logits.argmax(-1) == reference.argmax(-1)).double().mean())}
        if labels is not None:
            found["accuracy"] = 100 * float((logits.argmax(-1) == labels).double().mean())
        return {**found, "kl_nats": float(kl)}

    return measure


def resnet(args: argparse.Namespace) -> Task:
    tensors = load_file(args.weights)
    module = ResNet(len({key.split(".")[1] for key in tensors if key.startswith("layer1.")}))
    module.load_state_dict(tensors, strict=False)  # num_batches_tracked is not in the file
    images, labels = cifar(args.data)
    batches = list(images[:1000][:: max(1, 1000 // args.samples)].split(125))
    return Task(module.eval(), batches, agreement(images[1000:], module, labels[1000:]), ["conv1", "linear"])


# ---- EfficientNet-Lite0 ----------------------------------------------------------------------------------------------
def same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pads as TensorFlow does: as much as the stride needs, the odd pixel at the end."""
    around: list[int] = []
    for size in (x.shape[3], x.shape[2]):
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        around += [total // 2, total - total // 2]
    return F.pad(x, around)


class Inverted(nn.Module):
    """Expand, depthwise, project; padded outside the convolutions, so that hooks see what the weights meet."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = inside * expand
        if expand > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(inside, wide, 1, bias=False), nn.BatchNorm2d(wide, 1e-3)
        self._depthwise_conv = nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, 1e-3)
        self._project_conv, self._bn2 = nn.Conv2d(wide, outside, 1, bias=False), nn.BatchNorm2d(outside, 1e-3)
        self.expand, self.kernel, self.stride, self.adds = expand, kernel, stride, stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expand > 1 else x
        y = F.relu6(self._bn1(self._depthwise_conv(same(y, self.kernel, self.stride))))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112))
    LAST = ((4, 5, 2, 6, 192), (1, 3, 1, 6, 320))  # blocks, kernel, stride, expansion, channels

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, 1e-3)
        blocks, inside = [], 32
        for count, kernel, stride, expand, outside in (*self.STAGES, *self.LAST):
            for number in range(count):
                blocks.append(Inverted(inside, outside, kernel, 1 if number else stride, expand))
                inside = outside
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280, 1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(same(x, 3, 2))))
        for block in self._blocks:
            x = block(x)
        logits: Tensor = self._fc(F.relu6(self._bn1(self._conv_head(x))).mean((2, 3)))
        return logits


def efficientnet(args: argparse.Namespace) -> Task:
    """CIFAR images enlarged to 128 x 128: not what the network was trained on, so only agreement is counted."""
    module = EfficientNetLite0()
    module.load_state_dict(load_file(args.weights))
    images, _ = cifar(args.data)
    pixels = images * STD.view(3, 1, 1) + MEAN.view(3, 1, 1)
    large = F.interpolate((pixels * 255 - 127) / 128, size=128, mode="bicubic")
    module.eval()
    batches = list(large[:1000][:: max(1, 1000 // args.samples)].split(32))
    measure = agreement(large[1000::4], module, None)
    return Task(module, batches, measure, ["_conv_stem", "_fc"], r".*_depthwise_conv")


# ---- sentence encoders -----------------------------------------------------------------------------------------------
class Encoder(nn.Module):
    """The mean over tokens, then the dense layers that lie beside some models in folders of their own."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoModel

        super().__init__()
        bert = {"add_pooling_layer": False} if AutoConfig.from_pretrained(folder).model_type == "bert" else {}
        self.body = AutoModel.from_pretrained(folder, dtype=torch.float32, **bert)
        self.heads = nn.Sequential()
        for place in sorted(folder.glob("?_Dense")):
            weights = load_file(place / "model.safetensors")
            head = nn.Linear(*weights["linear.weight"].shape[::-1], bias="linear.bias" in weights)
            head.load_state_dict({name.removeprefix("linear."): tensor for name, tensor in weights.items()})
            self.heads.append(head)

    def forward(self, input_ids: Tensor) -> Tensor:
        mean: Tensor = self.heads(self.body(input_ids=input_ids).last_hidden_state.mean(1))
        return mean


def sentences(path: Path, count: int) -> list[str]:
    """Evenly spread sentences of 40 to 240 characters."""
    text = re.sub(r"\s+", " ", re.sub(r"^ *=.*$", "", path.read_text(encoding="utf-8"), flags=re.M))
    text = re.sub(r" ([.,;:)])", r"\1", text.replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", "."))
    found = [part for part in re.split(r"(?<=[.!?]) (?=[A-Z])", text) if 40 <= len(part) <= 240]
    return found[:: max(1, len(found) // count)][:count]


def tokenized(tokenizer: Any, texts: list[str]) -> list[dict[str, Tensor]]:
    """Batches of sentences of one length in tokens: padding would be input like any other."""
    lengths: dict[int, list[list[int]]] = {}
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        lengths.setdefault(len(ids), []).append(ids)
    return [{"input_ids": torch.tensor(rows)} for _, rows in sorted(lengths.items())]


def encoder(args: argparse.Namespace) -> Task:
    from transformers import AutoTokenizer

    module = Encoder(args.weights).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.weights)
    batches = tokenized(tokenizer, sentences(args.data, args.samples))
    held = tokenized(tokenizer, sentences(args.held, 500))

    def embed(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return F.normalize(torch.cat([model(**batch) for batch in held]), dim=-1)

    dense = embed(module)
    pairs = torch.triu_indices(len(dense), len(dense), 1)

    def measure(model: nn.Module) -> dict[str, float | str]:
        from scipy.stats import spearmanr

        ours = embed(model)
        similar = [(vectors @ vectors.T)[pairs[0], pairs[1]].numpy() for vectors in (dense, ours)]
        return {"cosine": float((dense * ours).sum(-1).mean()), "spearman": float(spearmanr(*similar).statistic)}

    return Task(module, batches, measure, [])


# ---- Whisper ---------------------------------------------------------------------------------------------------------
def whisper(args: argparse.Namespace) -> Task:
    """Calibrated on the first half of the recording (several gains, offsets), measured on the second and on all."""
    import soundfile
    from scipy.signal import resample_poly
    from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

    module = WhisperForConditionalGeneration.from_pretrained(args.weights, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.weights)
    extractor = WhisperFeatureExtractor.from_pretrained(args.weights)
    spoken = ["en", "transcribe"] if module.generation_config.is_multilingual else []
    names = [f"<|{name}|>" for name in ("startoftranscript", *spoken, "notimestamps")]
    begin = [tokenizer.convert_tokens_to_ids(name) for name in names]
    asked = dict(zip(("language", "task"), spoken, strict=False))
    sound, rate = soundfile.read(args.data)
    sound = resample_poly(sound.mean(-1) if sound.ndim > 1 else sound, 16000, rate)
    half = len(sound) // 2

    def features(wave: Any) -> Tensor:
        return extractor(wave, sampling_rate=16000, return_tensors="pt")["input_features"]

    def transcript(model: Any, wave: Any) -> Tensor:
        with torch.no_grad():
            tokens = model.generate(input_features=features(wave), max_new_tokens=60, **asked)
        start = torch.tensor([[start for start in begin if start not in tokens]], dtype=torch.long)
        return torch.cat([start, tokens], -1)  # generate leaves out the tokens it begins with

    batches = []
    for gain, start in ((1.0, 0), (0.6, half // 4), (0.3, half // 2)):
        wave = gain * sound[start:half]
        batches.append({"input_features": features(wave), "decoder_input_ids": transcript(module, wave)})
    tests = {"second half": sound[half:], "all": sound}
    dense = {name: transcript(module, wave) for name, wave in tests.items()}

    def measure(model: nn.Module) -> dict[str, float | str]:
        found: dict[str, float | str] = {}
        for name, wave in tests.items():
            with torch.no_grad():
                both = [m(input_features=features(wave), decoder_input_ids=dense[name]).logits for m in (module, model)]
            same_top = (both[0].argmax(-1) == both[1].argmax(-1)).double().mean()
            mine, theirs = (
                tokenizer.decode(t[0], skip_special_tokens=True) for t in (transcript(model, wave), dense[name])
            )
            found |= {f"{name}: next token as dense": 100 * float(same_top), f"{name}: same words": str(mine == theirs)}
            found[f"{name}: text"] = mine.strip()
        return found

    return Task(module, batches, measure, ["proj_out"])


TASKS = {"resnet": resnet, "efficientnet": efficientnet, "minilm": encoder, "encoder": encoder, "whisper": whisper}


def row_of(task: Task, rule_text: str, way: str, args: argparse.Namespace) -> dict[str, Any]:
    rule, choices = way_of(way, rule_of(rule_text))
    skip = [*task.skip, *args.skip]
    rules = {task.fine: Grid(args.fine_bits, None)} if task.fine and args.fine_bits else {}
    begin = time.perf_counter()
    result = compress_module(
        task.module, task.batches, rule, choices, rules=rules, skip=skip, passes=args.passes,
        batchnorm=args.batchnorm, correct=args.correct,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    weights = [math.prod(row.shape) for row in result.report]
    mean = {
        field: sum(getattr(row, field) * n for row, n in zip(result.report, weights, strict=True)) / sum(weights)
        for field in ("relative_loss", "bits_per_weight", "sparsity")
    }
    options = {"passes": args.passes, "batchnorm": args.batchnorm, "correct": args.correct}
    head = {"rule": rule_text, "way": way, **options, "layers": len(result.report), "readings": result.readings}
    return {**head, **task.measure(result.module.eval()), **mean, "seconds": round(seconds, 1)}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("task", choices=TASKS)
    ask.add_argument("--weights", type=Path, required=True)
    ask.add_argument("--data", type=Path, required=True)
    ask.add_argument("--held", type=Path, help="minilm: text for the measurement")
    ask.add_argument("--rules", default="4s,4a,3s,3a,50,2:4")
    ask.add_argument("--ways", default="rtn,papers,ours,greedy")
    ask.add_argument("--samples", type=int, default=1000, help="images or sentences to calibrate on")
    ask.add_argument("--passes", choices=("sequential", "one"), default="one")
    ask.add_argument("--skip", action="append", default=[], help="leave more layers dense")
    ask.add_argument("--batchnorm", choices=("shift", "reset", "keep"), default="shift")
    ask.add_argument("--fine-bits", type=float, help="efficientnet: of depthwise layers, whatever the rule")
    ask.add_argument("--correct", action="store_true", help="correct layer norms")
    args = ask.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = TASKS[args.task](args)
    rows: list[dict[str, Any]] = [{"rule": "dense", "way": "", **task.measure(task.module)}]
    if norms.batch_norms(task.module) and args.batchnorm == "reset":  # the reset alone, nothing compressed
        module = copy.deepcopy(task.module)
        with at_rest(module):
            found = norms.batch_norms(module)
            norms.reset_batch_norms(found, norms.batch_statistics(Feed(module, task.batches), found))
        rows.append({"rule": "dense, batch norms reset", "way": "", **task.measure(module)})
    for rule in args.rules.split(","):
        for way in args.ways.split(","):
            rows.append(row_of(task, rule, way, args))
            print(json.dumps(rows[-1]), flush=True)
    print(json.dumps({"command": sys.argv[1:], "rows": rows}))


if __name__ == "__main__":
    main()
