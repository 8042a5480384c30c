"""Fine-tunes a small Llama with TRL's SFTTrainer on sentences of which some are wrong, and lists the suspects.

python examples/trl_sft.py --noise 0.2
"""

from datasets import Dataset
from facts import arguments, llama, load, summary, word_tokenizer
from trl import SFTConfig, SFTTrainer

from gwa_logging import with_ids
from gwa_logging.integrations.transformers import GWACallback


def main() -> None:
    args = arguments(__doc__)
    facts, tokenizer = load(args.noise, args.seed), word_tokenizer()
    data = Dataset.from_dict({"prompt": facts.prompts, "completion": facts.completions})

    callback = GWACallback(
        backend=args.backend.split(","),  # by default: the trackers that the trainer reports to
        num_samples=len(data),  # a ledger of documents
        sample_ids="sample_id",  # the column that with_ids adds
    )
    trainer = SFTTrainer(
        llama(tokenizer, args.seed),
        args=SFTConfig(
            "trl_output",
            num_train_epochs=args.epochs,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=with_ids(data),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    summary(callback.monitor, facts)


if __name__ == "__main__":
    main()
