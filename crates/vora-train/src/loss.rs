//! The language loss: cross-entropy in f32, over supervised positions only.

use tch::{Kind, Reduction, Tensor};

/// `-log softmax(logits(hidden))[target]`, summed over all rows: `[n, hidden]`, `[n]` -> f32 scalar.
///
/// The sum, not the mean, so that micro-batches with unlike numbers of supervised tokens add up to the large batch:
/// divide by the number of targets in all of them. Logits, the widest tensor of a step, are made `chunk` rows at a
/// time; with more rows than that each chunk's gradient is taken at once, and the loss returned carries the sum of
/// them, so `logits` must have no trained weights of its own there.
pub fn cross_entropy(hidden: &Tensor, targets: &Tensor, chunk: i64, logits: impl Fn(&Tensor) -> Tensor) -> Tensor {
    let n = targets.size()[0];
    if n <= chunk || !hidden.requires_grad() {
        let starts = (0..n.max(1)).step_by(chunk.max(1) as usize);
        let parts = starts.map(|start| {
            let rows = chunk.min(n - start);
            chunk_loss(&hidden.narrow(0, start, rows), &targets.narrow(0, start, rows), &logits)
        });
        return parts.reduce(|a, b| a + b).expect("at least one chunk");
    }
    let mut value = Tensor::zeros([], (Kind::Float, hidden.device()));
    let mut gradients = Vec::new();
    for start in (0..n).step_by(chunk.max(1) as usize) {
        let rows = chunk.min(n - start);
        let leaf = hidden.narrow(0, start, rows).detach().set_requires_grad(true);
        let loss = chunk_loss(&leaf, &targets.narrow(0, start, rows), &logits);
        gradients.extend(Tensor::run_backward(&[&loss], &[&leaf], false, false));
        value += loss.detach();
    }
    // A scalar whose value is the loss and whose derivative by `hidden` is the gradient found above.
    let gradient = Tensor::cat(&gradients, 0); // [n, hidden]
    let carrier = (hidden * gradient).sum(Kind::Float);
    value + (&carrier - carrier.detach())
}

fn chunk_loss(hidden: &Tensor, targets: &Tensor, logits: impl Fn(&Tensor) -> Tensor) -> Tensor {
    let logits = logits(hidden).to_kind(Kind::Float); // [rows, vocab]
    logits.cross_entropy_loss::<Tensor>(targets, None, Reduction::Sum, -100, 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_reference() {
        let golden = fixtures::open("losses");
        let hidden = golden["ce.hidden"].copy().set_requires_grad(true);
        let (targets, head) = (&golden["ce.targets"], &golden["ce.lm_head"]);
        let n = targets.size()[0] as f64;
        let loss = cross_entropy(&hidden, targets, 1 << 10, |h| h.linear::<&Tensor>(head, None)) / n;
        fixtures::assert_close_to(&loss, &golden["ce.loss"], 1e-5);
        loss.backward();
        fixtures::assert_close_to(&hidden.grad(), &golden["ce.hidden_grad"], 1e-6);
    }

    #[test]
    fn chunks_change_nothing() {
        let golden = fixtures::open("losses");
        let (targets, head) = (&golden["ce.targets"], &golden["ce.lm_head"]);
        let run = |chunk| {
            let hidden = golden["ce.hidden"].copy().set_requires_grad(true);
            let loss = cross_entropy(&(&hidden * 1.5), targets, chunk, |h| h.linear::<&Tensor>(head, None)) * 0.25;
            loss.backward();
            (loss.detach(), hidden.grad())
        };
        let (whole, whole_grad) = run(1 << 10);
        for chunk in [1, 3, 4] {
            let (loss, grad) = run(chunk);
            fixtures::assert_close_to(&loss, &whole, 1e-5);
            fixtures::assert_close_to(&grad, &whole_grad, 1e-6);
            let frozen = tch::no_grad(|| {
                cross_entropy(&(&golden["ce.hidden"] * 1.5), targets, chunk, |h| h.linear::<&Tensor>(head, None))
            });
            fixtures::assert_close_to(&(frozen * 0.25), &whole, 1e-5);
        }
    }
}
