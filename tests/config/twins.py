"""For each rule, configurations that it alone applies to: its wrong twins."""

from __future__ import annotations

from typing import Any, NamedTuple


class Twin(NamedTuple):
    """A configuration that one rule applies to."""

    ds: dict[str, Any] = {}
    """Merged into GOOD; None deletes a key."""
    run: dict[str, Any] = {}
    world: int = 1
    device: str = "cpu"
    beside: tuple[str, ...] = ()
    """Further rules that necessarily apply."""


BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
BF16_STATES = {
    "bf16": {
        "enabled": True,
        "bf16_master_weights_and_grads": True,
        "bf16_optimizer_states": True,
    }
}
NVME = {"device": "nvme", "nvme_path": "/tmp"}
PLAIN = {"train": {"engine": "plain"}}


def stage(number: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": number, **keys}}


def offload(number: int, **keys: Any) -> dict[str, Any]:
    return stage(number, offload_optimizer={"device": "cpu", **keys})


def scheduler(kind: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


def optimizer(kind: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": {"torch_adam": None, **params}}}


def checkpointing(**keys: Any) -> dict[str, Any]:
    return {"activation_checkpointing": keys}


def model(**fields: Any) -> dict[str, Any]:
    return {"model": fields}


def parallel(**fields: Any) -> dict[str, Any]:
    return {"parallel": fields}


def data(**fields: Any) -> dict[str, Any]:
    return {"data": fields}


def speed(**fields: Any) -> dict[str, Any]:
    return {"speed": fields}


def schedule(kind: str, **fields: Any) -> dict[str, Any]:
    return {"schedule": {"kind": kind, **fields}}


TP2, PP2, CP2 = parallel(tp=2), parallel(pp=2), parallel(cp=2)

TWINS: dict[str, list[Twin]] = {
    "not-supported": [
        Twin({"elasticity": {"enabled": True}}),
        Twin({"elasticity": {"max_train_batch_size": 8}}),
        Twin({"amp": {"enabled": True}}),
        Twin({"sparse_gradients": True}),
        Twin(stage(2, zenflow={"topk_ratio": 0.1})),
        Twin(stage(3, zero_quantized_weights=True)),
        Twin(stage(3, mics_shard_size=2)),
        Twin(optimizer("AdamW", max_grad_norm=1.0)),
        Twin(optimizer("AdamW", torch_adam=False, fused=True)),
        Twin(offload(2) | optimizer("AdamW", torch_adam=False, fused=True)),
        Twin({"data_types": {"param_dtype": "fp32"}}),
        Twin(scheduler("WarmupLR", warmup_num_steps=5, last_batch_iteration=7)),
    ],
    "default-only": [
        Twin({"gradient_allreduce_op": "sum"}),
        Twin(stage(2, offload_optimizer={"device": "cpu", "super_offload": True})),
        Twin(optimizer("AdamW", torch_adam=True, maximize=True)),
    ],
    "unread": [
        Twin({"disable_allgather": True}),
        Twin({"dataloader_drop_last": True}),
        Twin({"autotuning": {"enabled": True}}),
        Twin({"zero_force_ds_cpu_optimizer": True}),
        Twin(checkpointing(profile=True, number_checkpoints=2)),
        Twin(BF16 | stage(1) | {"bf16": {"enabled": True, "check_grad_overflow": True}}),
        Twin(stage(1, compute_grad_norm=True)),
        Twin(stage(3, stage3_gather_16bit_weights_on_model_save=True)),
        Twin({"checkpoint": {"load_universal": True}}),
        Twin({"checkpoint": {"writer": {"type": "fast"}}}),
    ],
    "other-offload-device": [
        Twin(offload(2, nvme_path="/local_nvme")),
        Twin({"aio": {"block_size": 1048576}}),
        Twin(stage(2, offload_optimizer={"device": "none", "buffer_count": 9})),
        Twin(stage(3, offload_param={"device": "cpu", "max_in_cpu": 1e8})),
    ],
    "other-zero-stage": [
        Twin(stage(0, overlap_comm=True)),
        Twin(stage(0, reduce_bucket_size=5e8)),
        Twin(stage(1, stage3_max_live_parameters=1e9)),
        Twin(stage(2, stage3_prefetch_bucket_size="auto")),
        Twin(stage(3, allgather_bucket_size=500000000)),
        Twin(stage(0, contiguous_gradients=False)),
    ],
    "world-grid": [
        Twin(run=TP2, world=3),
        Twin(run=parallel(tp=2, cp=2), world=2),
        Twin(checkpointing(partition_activations=True) | {"train_batch_size": 8}, TP2),
    ],
    "batch-triple": [
        Twin({"train_batch_size": 17}),
        Twin({"train_batch_size": 8}, world=2),
        Twin({"train_batch_size": 3, "train_micro_batch_size_per_gpu": None}, world=2),
    ],
    "data-stages": [
        *(
            Twin(run=data(stages=text))
            for text in ("", "a", "8e5", "5=", "x=a", "0=a", "-5=a", "9=a;8=b", "9=a;9=b", "9=a;")
        ),
        Twin(run=data(stages="9=a:0.5,b")),
        Twin(run=data(stages=[{"tokens": 9, "path": "a:0.5,a:0.5"}])),
    ],
    "stage-not-reached": [
        Twin(run=data(stages="9=a;819200=b")),
        Twin(
            {"gradient_accumulation_steps": 2},
            data(stages="700000=a") | {"train": {"steps": 200, "batch_ramp": "0:8,100:16"}},
        ),
    ],
    "skip-samples": [
        *(
            Twin(run=data(skip_samples=text))
            for text in ("", "5", "a-b", "5-", "-5", "7-6", "1-2,", "1-2;3-4", "0-" + "9" * 19)
        ),
        Twin(run=data(skip_samples=[[3, 2]])),
    ],
    "blend-text": [
        *(
            Twin(run=data(path=text))
            for text in (
                "a:1,./a/:1",
                "a,b",
                "a:1,b",
                "a:0.5,a:0.5",
                ":1,b:1",
                "a:1,,b:1",
                "a:0,b:1",
                "a:-1,b:2",
            )
        ),
        Twin(run=data(path="a:1,b:1e-400000")),
        Twin(run=data(path=[{"path": "a", "weight": 1}, {"path": "b,c", "weight": 1}])),
    ],
    "reset-needs-mask": [Twin(run=data(reset_positions=True))],
    "reset-needs-positions": [
        Twin(run=data(reset_positions=True, document_mask=True) | model(position="none"))
    ],
    "heads-over-tp": [
        Twin(run=TP2 | model(n_head=3, d_head=64), world=2),
        Twin(run=TP2 | model(n_kv_head=1), world=2),
        Twin(run=CP2 | model(n_kv_head=1), world=2),
        Twin(run=parallel(tp=2, cp=2) | model(n_kv_head=2), world=4),
    ],
    "ff-over-tp": [Twin(run=TP2 | model(d_ff=63), world=2)],
    "sequence-over-ranks": [
        Twin(run=CP2 | {"data": {"seq_len": 31}}, world=2),
        Twin(run=parallel(tp=2, sequence=True) | {"data": {"seq_len": 31}}, world=2),
        Twin(run=parallel(tp=2, cp=2, sequence=True) | {"data": {"seq_len": 30}}, world=4),
    ],
    "sequence-needs-tp": [Twin(run=parallel(sequence=True))],
    "layers-over-pp": [Twin(stage(1), PP2 | model(n_layer=1), 2)],
    "partition-text": [
        Twin(stage(1), parallel(pp=2, partition=text), 2)
        for text in (
            "",
            "best",
            "3",
            "2,1,1",
            "3,2",
            "4,0",
            "-1,5",
            "2,x",
            "type:",
            "type:Attention",
            "type:Rms",
        )
    ]
    + [Twin(run=parallel(partition=text)) for text in ("uniform", "4", "type:Block")],
    "batch-ramp": [
        *(
            Twin(run={"train": {"batch_ramp": text}})
            for text in (
                "",
                "8",
                "0:4:8",
                "0:a",
                "1:8",
                "0:4,4:4,9:8",
                "0:4,0:8",
                "0:0,5:8",
                "0:-8",
            )
        ),
        Twin({"gradient_accumulation_steps": 4}, {"train": {"batch_ramp": "0:8,10:16"}}),
        Twin({"gradient_accumulation_steps": 4}, {"train": {"batch_ramp": "0:12,10:32"}}),
        Twin({"gradient_accumulation_steps": 2}, {"train": {"batch_ramp": "0:8,10:32"}}, 2),
    ],
    "head-width": [Twin(run=model(n_head=3))],
    "kv-heads": [Twin(run=model(n_kv_head=3))],
    "mup-needs-base": [
        Twin(run=model(mup_base_d_head=32)),
        Twin(run=model(mup_base=256, mup_base_d_head=32)),
    ],
    "pattern-needs-window": [Twin(run=model(window_pattern=2))],
    "rotary-width": [Twin(run=model(position="rotary", d_head=33))],
    "sinusoidal-width": [Twin(run=model(position="sinusoidal", d_model=33, d_head=8))],
    "sequence-too-long": [
        Twin(run={"data": {"seq_len": 257}}),
        Twin(run={"data": {"seq_len": 257}} | model(position="sinusoidal")),
    ],
    "pipeline-zero": [Twin(stage(2), PP2, 2)],
    "pipeline-bf16": [Twin(BF16 | stage(1), PP2, 2)],
    "pipeline-tied": [
        Twin(BF16 | offload(1) | FP32_SUMS, PP2, 2),
        Twin(FP16 | stage(1) | FP32_SUMS, PP2, 2, device="cuda"),
    ],
    "pipeline-overlap": [Twin(stage(1, overlap_comm=True), PP2, 2)],
    "pipeline-timers": [
        Twin({"wall_clock_breakdown": True, "steps_per_print": 1}, PP2, 2),
        Twin({"flops_profiler": {"enabled": True}}, PP2, 2),
    ],
    "plain-world": [
        Twin(run=PLAIN, world=2),
        Twin(run=PLAIN | TP2, world=2),
        Twin(run=PLAIN | CP2, beside=("world-grid",)),
    ],
    "plain-engine": [
        Twin(FP16, PLAIN, device="cuda"),
        Twin(offload(2), PLAIN),
    ],
    "plain-optimizer": [
        Twin(optimizer("SGD"), PLAIN),
        Twin(optimizer("AdamW", bias_correction=False), PLAIN),
    ],
    "plain-scheduler": [
        Twin(
            {
                "scheduler": {
                    "type": "OneCycle",
                    "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3},
                }
            },
            PLAIN,
        )
    ],
    "plain-ignores": [Twin({"wall_clock_breakdown": True}, PLAIN)],
    "two-precisions": [Twin(FP16 | BF16 | stage(1), device="cuda")],
    "fp16-on-cpu": [Twin(FP16 | stage(1))],
    "half-precision-zero-0": [Twin(BF16), Twin(FP16, device="cuda")],
    "grad-accum-dtype": [
        Twin(stage(2) | {"data_types": {"grad_accum_dtype": "bf16"}}),
        Twin(BF16 | stage(1) | {"data_types": {"grad_accum_dtype": "fp16"}}),
    ],
    "immediate-grad-update": [
        Twin(stage(1) | {"bf16": {"enabled": True, "immediate_grad_update": True}})
    ],
    "bf16-master-weights": [
        Twin(stage(2) | {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}),
        Twin(stage(2) | {"bf16": {"enabled": True, "bf16_optimizer_states": True}}),
        Twin(stage(1) | BF16_STATES),
        Twin(stage(2) | {"bf16": BF16_STATES["bf16"] | {"enabled": False}}),
        Twin(offload(2) | optimizer("AdamW", torch_adam=True) | BF16_STATES),
        Twin(
            offload(2)
            | optimizer("AdamW")
            | {"bf16": {"enabled": True, "bf16_optimizer_states": True}}
        ),
    ],
    "autocast": [
        Twin({"torch_autocast": {"enabled": True, "dtype": "float16"}}),
        Twin(BF16 | stage(1) | {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
        Twin({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, TP2, 2),
        Twin({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, PLAIN),
    ],
    "autocast-dtype": [Twin({"torch_autocast": {"enabled": True}})],
    "hpz-size": [
        Twin(stage(3, zero_hpz_partition_size=3), world=4),
        Twin(stage(3, zero_hpz_partition_size=2), TP2, 2),
    ],
    "static-loss-scale": [
        Twin(
            stage(1) | {"fp16": {"enabled": True, "loss_scale": 128, "hysteresis": 2}},
            device="cuda",
        )
    ],
    "offload-stage": [
        Twin(offload(0)),
        Twin(stage(2, offload_param={"device": "cpu"})),
    ],
    "nvme-stage": [Twin(stage(2, offload_optimizer={"device": "nvme"}))],
    "nvme-optimizer": [
        Twin(stage(3, offload_optimizer=NVME) | optimizer("SGD"), beside=("untested-optimizer",)),
        Twin(stage(3, offload_optimizer=NVME) | BF16_STATES | optimizer("AdamW", torch_adam=False)),
        Twin(stage(3, offload_optimizer={**NVME, "ratio": 0.5}) | optimizer("AdamW")),
        Twin(stage(3, offload_optimizer=NVME), {"train.ema": 0.9}),
    ],
    "nvme-buffers": [
        Twin(stage(3, offload_optimizer={**NVME, "buffer_count": 3})),
        Twin(stage(3, offload_optimizer={**NVME, "pipeline_read": True})),
        Twin(stage(3, offload_optimizer=NVME) | optimizer("AdamW", amsgrad=True)),
    ],
    "aio-block": [Twin(stage(3, offload_optimizer=NVME) | {"aio": {"block_size": 1000}})],
    "nvme-path": [
        Twin(stage(3, offload_param={"device": "nvme"})),
        Twin(stage(3, offload_optimizer={"device": "nvme"})),
        Twin(stage(3, offload_param={"device": "nvme", "nvme_path": "/no/such/place"})),
    ],
    "nvme-buffer": [
        Twin(stage(3, offload_param={"device": "nvme", "nvme_path": "/tmp", "buffer_size": 1000}))
    ],
    "partial-offload": [
        Twin(offload(2, ratio=0.5) | optimizer("AdamW")),
        Twin(offload(3, ratio=0.5)),
    ],
    "even-allgather-bucket": [Twin(stage(2, allgather_bucket_size=1001))],
    "reduce-scatter-scaling": [
        Twin(stage(2) | {"prescale_gradients": True}),
        Twin(stage(3) | {"gradient_predivide_factor": 2.0}),
    ],
    "predivide-unread": [Twin({"prescale_gradients": True, "gradient_predivide_factor": 2.0})],
    "optimizer-untrained": [Twin(optimizer("MuSGD")), Twin(optimizer("MuAdam"))],
    "optimizer-package": [Twin(optimizer("AdamW8bit")), Twin(optimizer("Adam8bit"), PLAIN)],
    "optimizer-stage": [
        Twin(stage(2) | optimizer("Adagrad")),
        Twin(optimizer("Lion")),
        Twin(optimizer("Lamb")),
        Twin(stage(1) | optimizer("Lamb"), device="cuda"),
        Twin(offload(1) | optimizer("Lamb"), device="cuda"),
        Twin(optimizer("Lamb"), TP2, 2, device="cuda"),
    ],
    "untested-optimizer": [Twin(stage(2) | optimizer("SGD"))],
    "untested-flag-idle": [Twin(stage(2) | {"zero_allow_untested_optimizer": True})],
    "scheduler-type": [Twin({"scheduler": {"params": {}}})],
    "scheduler-params": [
        Twin(scheduler("OneCycle", cycle_max_lr=0.01)),
    ],
    "schedule-too-short": [
        Twin(
            scheduler("WarmupCosineLR", total_num_steps=399, warmup_num_steps=5),
            {"train": {"steps": 400}},
        )
    ],
    "warmup-too-long": [
        Twin(scheduler("WarmupCosineLR", total_num_steps=400, warmup_num_steps=400)),
        Twin(scheduler("WarmupLR")),
    ],
    "warmup-of-one": [
        Twin(scheduler("WarmupLR", warmup_num_steps=n), {"train": {"steps": 9}}) for n in (0, 1)
    ],
    "mup-optimizer": [
        Twin({"optimizer": {"type": "SGD", "params": {"lr": 1e-3}}}, model(mup_base=64))
    ],
    "muon-rates": [
        Twin(optimizer("Muon", lr=None)),
        Twin(optimizer("Muon", lr=None, muon_lr=0.01)),
    ],
    "muon-one-cycle": [
        Twin(scheduler("OneCycle", cycle_min_lr=1e-4, cycle_max_lr=1e-3) | optimizer("Muon"))
    ],
    "muon-lr-idle": [Twin(optimizer("Muon", muon_lr=0.02, adam_lr=1e-3))],
    "lr-stated-twice": [
        Twin(
            scheduler("WarmupLR", warmup_num_steps=5, warmup_max_lr=1e-3)
            | optimizer("Muon", lr=1e-3, muon_lr=0.02)
        ),
        Twin(scheduler("WarmupLR", warmup_num_steps=5, warmup_max_lr=0.1)),
        Twin(
            scheduler("WarmupDecayLR", total_num_steps=400, warmup_num_steps=5)
            | {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
        ),
    ],
    "lr-order": [
        Twin(scheduler("OneCycle", cycle_min_lr=0.1, cycle_max_lr=0.01)),
        Twin(scheduler("WarmupLR", warmup_num_steps=5, warmup_min_lr=1, warmup_max_lr="auto")),
    ],
    "schedule-stated-twice": [
        Twin(scheduler("WarmupCosineLR", total_num_steps=400, warmup_num_steps=5), schedule("wsd")),
        Twin(scheduler("WarmupLR", warmup_num_steps=5), schedule("constant")),
    ],
    "schedule-fields": [
        Twin(run={"schedule": {"warmup_steps": 5}}),
        Twin(run=schedule("deepspeed", min_ratio=0.1)),
        Twin(run=schedule("cosine", decay_steps=5)),
        Twin(run=schedule("linear", decay_shape="cosine")),
        Twin(run=schedule("constant", min_ratio=0.1)),
        Twin(run=schedule("constant", min_ratio=0.0)),
        Twin(run=schedule("deepspeed", momentum_warmup_steps=5)),
        Twin(run=schedule("deepspeed", weight_decay="linear")),
    ],
    "momentum-warmup": [
        Twin(run=schedule("wsd", momentum_start=0.5)),
        Twin(optimizer("SGD"), schedule("wsd", momentum_warmup_steps=5)),
        Twin(optimizer("Adagrad"), schedule("wsd", momentum_warmup_steps=5, momentum_start=0.5)),
    ],
    "weight-decay-schedule": [
        Twin(run=schedule("constant", weight_decay="linear")),
        Twin(optimizer("SGD", momentum=0.9), schedule("wsd", weight_decay="with_lr")),
    ],
    "schedule-parts": [
        Twin(run=schedule("wsd", warmup_steps=300, decay_steps=101)),
        Twin(run=schedule("wsd", decay_steps=400)),
        Twin(run=schedule("cosine", warmup_steps=401)),
        Twin(run=schedule("constant", warmup_steps=500, total_steps=450)),
    ],
    "schedule-ends-early": [
        Twin(run=schedule("wsd", total_steps=399)),
        Twin(run=schedule("cosine", total_steps=100)),
        Twin(
            {"optimizer": {"params": {"weight_decay": 0.1}}},
            schedule("constant", total_steps=100, weight_decay="linear"),
        ),
    ],
    "run-dir-name": [
        Twin(run={"run_dir": "runs/.."}),
        Twin(run={"run_dir": "."}),
        Twin(run={"run_dir": ""}),
    ],
    "partition-activations": [
        Twin(checkpointing(partition_activations=True)),
        Twin(
            checkpointing(
                partition_activations=True,
                contiguous_memory_optimization=True,
                number_checkpoints=2,
            ),
            beside=("contiguous-checkpoints",),
        ),
    ],
    "partition-sequence": [
        Twin(checkpointing(partition_activations=True), parallel(tp=2, sequence=True), 2)
    ],
    "partition-evenly": [
        Twin(
            checkpointing(partition_activations=True) | {"train_micro_batch_size_per_gpu": 1},
            TP2 | model(d_model=33, d_head=8, d_ff=64) | {"data": {"seq_len": 31}},
            2,
        )
    ],
    "contiguous-checkpoints": [
        Twin(checkpointing(contiguous_memory_optimization=True, number_checkpoints=4), TP2, 2),
        Twin(
            checkpointing(contiguous_memory_optimization=True, partition_activations=True), TP2, 2
        ),
    ],
    "contiguous-in-pipeline": [
        Twin(
            stage(1)
            | checkpointing(
                contiguous_memory_optimization=True,
                partition_activations=True,
                number_checkpoints=4,
            ),
            parallel(tp=2, pp=2),
            4,
        )
    ],
    "checkpointing-on-cpu": [
        Twin(checkpointing(cpu_checkpointing=True)),
        Twin(checkpointing(synchronize_checkpoint_boundary=True, number_checkpoints=2)),
    ],
    "number-checkpoints": [
        Twin(checkpointing(number_checkpoints=8)),
        Twin(checkpointing(number_checkpoints=3)),
    ],
    "monitor-package": [Twin({"wandb": {"enabled": True}})],
    "output-path": [
        Twin({"csv_monitor": {"enabled": True, "output_path": f"{__file__}/below"}}),
        Twin({"flops_profiler": {"enabled": True, "output_file": "/"}}),
    ],
    "comms-logger-partial": [
        Twin({"comms_logger": {"enabled": True, "verbose": True}}, TP2, 2),
        Twin({"comms_logger": {"enabled": True, "verbose": True}} | stage(1), PP2, 2),
    ],
    "profile-eager": [Twin({"flops_profiler": {"enabled": True}}, device="cuda")],
    "comms-logger-silent": [Twin({"comms_logger": {"enabled": True}})],
    "compile-blocks": [
        Twin(run=speed(compile="blocks") | model(dropout=0.1), device="cuda"),
        Twin(run=speed(compile="blocks") | data(document_mask=True), device="cuda"),
        Twin(run=speed(compile="blocks") | TP2, world=2, device="cuda"),
        Twin(run=speed(compile="blocks") | CP2, world=2, device="cuda"),
        Twin(stage(3), speed(compile="blocks"), device="cuda"),
        Twin(checkpointing(), speed(compile="blocks", recompute="cheap"), device="cuda"),
    ],
    "compile-needs-compiler": [Twin(run=speed(compile="blocks"))],
    "cuda-graphs": [
        Twin(run=speed(cuda_graphs=True)),
        Twin(run=speed(cuda_graphs=True, compile="off"), device="cuda"),
        Twin(stage(3), speed(cuda_graphs=True), device="cuda"),
    ],
    "loss-fused": [
        Twin(run=speed(loss="fused") | TP2, world=2),
        Twin(stage(1), speed(loss="fused") | PP2, 2),
    ],
    "fp8": [
        Twin(stage(1), speed(matmul="fp8")),
        Twin(BF16 | stage(1), speed(matmul="fp8") | TP2, world=2),
        Twin(BF16 | stage(1), speed(matmul="fp8") | model(d_ff=200)),
        Twin(BF16 | stage(1), speed(matmul="fp8") | data(seq_len=121)),
    ],
    "recompute-cheap": [
        Twin(run=speed(recompute="cheap")),
        Twin(checkpointing(cpu_checkpointing=True), speed(recompute="cheap"), device="cuda"),
    ],
    "profile-after-end": [Twin({"flops_profiler": {"enabled": True, "profile_step": 401}})],
}
