"""An update in plain torch: one answer a forward, the whole global batch in one backward, no DeepSpeed, no ranks."""

from __future__ import annotations

from pathlib import Path

import torch

from stages.update.batching import global_batches, token_batch
from stages.update.config import UpdateConfig
from stages.update.logps import answer_logps
from stages.update.model import load_policy
from stages.update.objectives.base import Groups, Pairs
from stages.update.rows import GroupRow
from stages.update.schedule import learning_rate_at

CPU = torch.device("cpu")


class PlainUpdate:
    """The update of a policy under `config`; `run` returns what it did in each step."""

    def __init__(self, folder: Path, config: UpdateConfig, rows, references, *, own: int | None, seed: int) -> None:
        self.config, self.rows, self.references, self.own, self.seed = config, rows, references, own, seed
        self.model = load_policy(folder, dtype="float32")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1.0, weight_decay=config.weight_decay)
        self.head = torch.nn.Linear(self.model.config.hidden_size, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        rates = [getattr(loss.params, "value_learning_rate", 0.0) for loss in config.losses()]
        self.head_optimizer = torch.optim.AdamW(self.head.parameters(), lr=max(rates), weight_decay=0.0)

    def run(self) -> list[dict]:
        config = self.config
        batches = list(
            global_batches(
                len(self.rows), size=config.global_batch_size, num_epochs=config.num_train_epochs, seed=self.seed
            )
        )
        return [self._step(step, len(batches), [self.rows[i] for i in batch]) for step, batch in enumerate(batches)]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def _step(self, step: int, total: int, batch) -> dict:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, total, self.config)
        own = self.own if step == 0 else None
        made = self._groups(batch, own) if isinstance(batch[0], GroupRow) else self._pairs(batch, own)
        counts = {"pairs": len(batch), "tokens": sum(row.num_chosen_tokens for row in batch)}
        terms = [term for loss in self.config.losses(gate_floor=1e-3) for term in loss.at(step)(made)]
        loss = sum((term.loss_B * term.weight_B).sum() / counts[term.normaliser] for term in terms)
        self.optimizer.zero_grad()
        self.head_optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.head_optimizer.step()
        return {"loss": loss.item(), "grad_norm": norm.item(), "made": made, "batch": batch, "terms": terms}

    def _logp(self, answer) -> torch.Tensor:
        return answer_logps(self.model, token_batch([answer.prompt_token_ids], [answer.token_ids]), CPU)[0]

    def _theirs(self, answer, logp, own) -> list[torch.Tensor]:
        return [
            logp.detach() if place == own else torch.tensor(table[answer.response_id])
            for place, table in enumerate(self.references)
        ]

    def _pairs(self, rows, own) -> Pairs:
        sides, theirs = [], []
        for side in (0, 1):
            answers = [row.answers[side] for row in rows]
            logps = [self._logp(answer) for answer in answers]
            found = [self._theirs(answer, logp, own) for answer, logp in zip(answers, logps, strict=True)]
            sides.append(torch.stack(logps))
            theirs.append(torch.tensor(found).reshape(len(rows), len(self.references)).T)
        lengths = [torch.tensor([float(len(row.answers[side].token_ids)) for row in rows]) for side in (0, 1)]
        needs, more = self.config.needs, {}
        if "auxiliary" in needs:
            more["aux_chosen_B"] = torch.tensor([row.aux_chosen for row in rows])
            more["aux_rejected_B"] = torch.tensor([row.aux_rejected for row in rows])
        if "value" in needs:
            more["value_B"] = torch.cat([self._value(row) for row in rows])
        if "stream" in needs:
            drawn = [torch.tensor(0.0) if row.stream is None else self._logp(row.stream) for row in rows]
            more["stream_logp_B"] = torch.stack(drawn)
            more["stream_len_B"] = torch.tensor([len(row.stream.token_ids) if row.stream else 0.0 for row in rows])
        return Pairs(*sides, *theirs, *lengths, **more)

    def _value(self, row) -> torch.Tensor:
        with torch.no_grad():
            prompt = torch.tensor([row.prompt_token_ids])
            hidden = self.model(input_ids=prompt, output_hidden_states=True).hidden_states[-1][0, -1]
        return self.head(hidden)

    def _groups(self, rows, own) -> Groups:
        shape = len(rows), max(row.num_answers for row in rows)
        logps, lengths, rewards = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
        mask, theirs = torch.zeros(shape, dtype=torch.bool), torch.zeros(len(self.references), *shape)
        for g, row in enumerate(rows):
            for k, answer in enumerate(row.answers):
                logps[g, k] = logp = self._logp(answer)
                theirs[:, g, k] = torch.tensor(self._theirs(answer, logp, own))
                lengths[g, k], rewards[g, k], mask[g, k] = len(answer.token_ids), row.rewards[k], True
        return Groups(logps, theirs, lengths, rewards, mask)


def plain_logps(folder: Path, answers) -> dict[str, float]:
    """Log-probs by response id."""
    model = load_policy(folder, dtype="float32")
    with torch.no_grad():
        return {
            answer.response_id: answer_logps(
                model, token_batch([answer.prompt_token_ids], [answer.token_ids]), CPU
            ).item()
            for answer in answers
        }
