"""What `--help` shows to be pasted: every line runs as it stands, in any folder, one after the other."""

from __future__ import annotations

from collections.abc import Mapping

RUN = "runs/demo/digits.jsonl"
GPT, RESNET = "dist_agc.lab.tasks.text:example", "dist_agc.lab.tasks.digits:NFResNet"
DEMO = {"dist-agc demo": "2 processes, FSDP2, handwritten digits; writes runs/demo"}

# Of the command itself, then by subcommand: what is typed, and what it shows.
MAIN: Mapping[str, str] = {
    "dist-agc demo": "training without and with AGC, side by side; writes runs/demo",
    f"dist-agc report {RUN}": "what AGC did in it, as one HTML file",
    "dist-agc check": "is it right on this machine?",
    f"dist-agc units --model {RESNET}": "what the units of a model are",
}
EXAMPLES: Mapping[str, Mapping[str, str]] = {
    "demo": {
        **DEMO,
        "dist-agc demo --lr 0.1": "a tame rate: both runs train",
        "dist-agc demo --clipping-threshold 0.2": "hardly clips: does it help?",
        "dist-agc demo --task text --nproc 4": "a small GPT, in 4 processes",
        "dist-agc demo --backend zero2": "DeepSpeed, where it is installed",
        "torchrun --nproc-per-node 2 -m dist_agc.cli demo": "in the processes of a launcher",
        "mpirun -n 2 dist-agc demo": "the same, where Open MPI is installed",
    },
    "check": {
        "dist-agc check": "every layout, in 2 processes",
        "dist-agc check --layout 'fsdp*' --shard-unaware": "beside AGC as it is written for one process",
        f"dist-agc check --model {GPT}": "a model of any package, or of a file in this folder",
        "torchrun --nproc-per-node 2 -m dist_agc.cli check": "in the processes of a launcher",
    },
    "units": {
        f"dist-agc units --model {RESNET}": "of any package, or of a file in this folder",
        f"dist-agc units --model {GPT} --observe": "what do its products say?",
        f"dist-agc units --model {RESNET} --units head.weight=": "as you say: this tensor is one unit",
    },
    "report": {
        **DEMO,
        f"dist-agc report {RUN}": "writes runs/demo/digits.html",
        "dist-agc demo --task text": "one more run",
        f"dist-agc report {RUN} runs/demo/text.jsonl --out both.html": "laid over each other",
    },
    "advise": {
        **DEMO,
        f"dist-agc advise {RUN}": "what each threshold would clip",
        f"dist-agc advise {RUN} --batch-size 512": "beside what was published for such batches",
    },
    "bench": {
        "dist-agc bench": "GPT-2 small, in one process",
        "dist-agc bench --model resnet50 --layout fsdp2 --nproc 2": "sharded over 2 processes",
        "dist-agc bench --cpu-kernel": "what a kernel in C++ gains on this machine",
        "dist-agc bench --layout zero2 --nproc 2": "DeepSpeed, where it is installed",
        f"dist-agc bench --model {RESNET} --clipped 0.1": "of any package, or of a file in this folder",
        "dist-agc bench --growth": "against elements, tensors and ranks",
    },
    "plan": {
        "dist-agc plan --model llama3-70b": "every layout, on 16,384 ranks",
        "dist-agc plan --model llama3-8b --layout fsdp1 --world 64 --world 1024": "one layout, two clusters",
        f"dist-agc plan --model {RESNET} --world 128": "of any package, or of a file in this folder",
    },
}
