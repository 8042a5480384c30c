"""Trains a small Llama in a plain loop, and lists the documents that look wrong.

python examples/llama_finetune.py --noise 0.2
"""

import torch
from facts import arguments, llama, load, summary, word_tokenizer
from torch.nn.utils.rnn import pad_sequence

import gwa_logging

BATCH = 16


def main() -> None:
    args = arguments(__doc__)
    facts, tokenizer = load(args.noise, args.seed), word_tokenizer()
    prompts = [tokenizer(prompt)["input_ids"] for prompt in facts.prompts]
    completions = [tokenizer(text + tokenizer.eos_token)["input_ids"] for text in facts.completions]
    tokens = [torch.tensor(a + b) for a, b in zip(prompts, completions, strict=True)]
    labels = [torch.tensor([-100] * len(a) + b) for a, b in zip(prompts, completions, strict=True)]

    model = llama(tokenizer, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(args.seed)
    watching = {"backend": args.backend.split(","), "num_samples": len(tokens)}
    with gwa_logging.watch(model, **watching) as monitor:
        for _ in monitor.epochs(args.epochs):
            for ids in torch.randperm(len(tokens), generator=generator).split(BATCH):
                inputs = pad_sequence([tokens[i] for i in ids], batch_first=True)  # 0 is the padding
                targets = pad_sequence([labels[i] for i in ids], batch_first=True, padding_value=-100)
                monitor.tag(ids)  # one id per row, which is a document
                model(input_ids=inputs, attention_mask=(inputs != 0).long(), labels=targets).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    summary(monitor, facts)


if __name__ == "__main__":
    main()
