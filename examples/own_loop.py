"""TALR in a training loop of one's own, with gradient accumulation: the same gradients as one large batch.

    python examples/own_loop.py

A small GRU learns to count. What matters is between the dashed lines: the model's body gives hidden states, the loss
takes them with the head, and `num_items` divides every micro-batch by the tokens of the whole batch.
"""

import torch

import fused_losses as fl

VOCABULARY, WIDTH, LENGTH = 512, 64, 32


class LanguageModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.body = torch.nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)

    def hidden_states(self, ids):
        return self.body(self.embedding(ids))[0]


def batch(generator, rows=16):
    """Counting sequences of ragged length, one token in twenty wrong; -100 after the end."""
    ids = torch.randint(64, (rows, 1), generator=generator) + torch.arange(LENGTH + 1)
    wrong = torch.rand(ids.shape, generator=generator) < 0.05
    ids = torch.where(wrong, torch.randint(VOCABULARY, ids.shape, generator=generator), ids)
    lengths = torch.randint(8, LENGTH, (rows, 1), generator=generator)
    labels = ids[:, 1:].masked_fill(torch.arange(LENGTH) >= lengths, -100)
    return ids[:, :-1], labels


def main(steps=60, micro_batches=4):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_function = fl.TALRLoss(temperature=2.0)  # a fixed τ does not depend on how the batch is split
    for step in range(steps):
        ids, labels = batch(generator)
        # ------------------------------------------------------------------------------------
        num_items = (labels != -100).sum()
        total = 0.0
        for part_ids, part_labels in zip(ids.chunk(micro_batches), labels.chunk(micro_batches), strict=True):
            hidden = model.hidden_states(part_ids)
            loss = loss_function(hidden, model.head, part_labels, num_items=num_items)
            loss.backward()
            total += loss.item()
        # ------------------------------------------------------------------------------------
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            with torch.no_grad():
                out = fl.token_losses(model.hidden_states(ids), model.head, labels)
            valid = labels != -100
            accuracy = (out.prediction == labels)[valid].float().mean()
            print(f"step {step:3}  loss {total:.3f}  nll {out.nll[valid].mean():.3f}  accuracy {accuracy:.2f}")
    return accuracy.item()


if __name__ == "__main__":
    main()
