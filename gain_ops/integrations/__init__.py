"""Other libraries: PEFT, (IA)^3 files, the Trainer, DeepSpeed, FSDP2, tensor parallelism."""
