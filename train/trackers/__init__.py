"""What services such as wandb and MLflow are shown of a run: what its log.jsonl says."""
