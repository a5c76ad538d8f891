//! Direct preference optimization: log-probabilities of whole answers, and the loss on pairs of them.

use tch::{Kind, Tensor};

/// `log softmax(logits(hidden))[target]` of each row, in f32: `[n, hidden]`, `[n]` -> `[n]`.
///
/// Logits are made `chunk` rows at a time; with more rows than that each chunk's gradient is taken at once, and the result
/// carries it, so `logits` must have no trained weights of its own there.
pub fn log_probabilities(hidden: &Tensor, targets: &Tensor, chunk: i64, logits: impl Fn(&Tensor) -> Tensor) -> Tensor {
    let of = |hidden: &Tensor, targets: &Tensor| {
        let log_probabilities = logits(hidden).to_kind(Kind::Float).log_softmax(-1, Kind::Float); // [rows, vocab]
        log_probabilities.gather(-1, &targets.unsqueeze(-1), false).squeeze_dim(-1)
    };
    let n = targets.size()[0];
    if n <= chunk {
        return of(hidden, targets);
    }
    let (mut values, mut gradients) = (Vec::new(), Vec::new());
    for start in (0..n).step_by(chunk.max(1) as usize) {
        let rows = chunk.min(n - start);
        let leaf = hidden.narrow(0, start, rows).detach().set_requires_grad(hidden.requires_grad());
        let chosen = of(&leaf, &targets.narrow(0, start, rows));
        if hidden.requires_grad() {
            // No row's log-probability depends on another row: the gradient of the sum has that of each.
            gradients.extend(Tensor::run_backward(&[chosen.sum(Kind::Float)], &[&leaf], false, false));
        }
        values.push(chosen.detach());
    }
    let value = Tensor::cat(&values, 0);
    if gradients.is_empty() {
        return value;
    }
    let carrier = (hidden * Tensor::cat(&gradients, 0)).sum_dim_intlist(-1, false, Kind::Float); // [n]
    value + (&carrier - carrier.detach())
}

/// What DPO makes of pairs, `[pairs]` each in f32.
#[derive(Debug)]
pub struct Dpo {
    /// The loss.
    pub losses: Tensor,
    /// `beta (log policy - log reference)` of the chosen answers, without a graph.
    pub chosen_rewards: Tensor,
    /// The same of the rejected ones.
    pub rejected_rewards: Tensor,
}

/// `-log sigmoid(beta ((pc - rc) - (pr - rr)))` of each pair, from the log-probabilities of whole answers, `[pairs]` each:
/// `pc` and `pr` the policy's of the chosen and the rejected one, `rc` and `rr` the reference's (arXiv 2305.18290, eq. 7;
/// TRL's `loss_type="sigmoid"`).
pub fn dpo(pc: &Tensor, pr: &Tensor, rc: &Tensor, rr: &Tensor, beta: f64) -> Dpo {
    let (chosen, rejected) = ((pc - rc) * beta, (pr - rr) * beta);
    let losses = -(&chosen - &rejected).log_sigmoid();
    Dpo { losses, chosen_rewards: chosen.detach(), rejected_rewards: rejected.detach() }
}
