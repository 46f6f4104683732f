"""Training by the Hugging Face Trainer.

trainer.py         LPTTrainer                     exact_resume.py  a Trainer that counts examples
cached_dataset.py  examples with cached rows      cursor.py        where a training stands
collators.py       batches of them                disk_room.py     saving to a disk that is full
projections.py     held rows, made from a cache   fsdp.py          a backbone over several devices
training_record.py what a checkpoint's weights mean
learning_rates.py  late LoRA's own                compute_dtype.py  bf16 on a CPU
figures.py         what the model card says    quick_steps.py  nothing around the step

Gives LPTTrainer, last_checkpoint and shard_frozen. Knows all rooms but the command line.
"""
