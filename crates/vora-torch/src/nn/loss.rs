//! The language losses, in f32: cross-entropy over supervised positions, the divergence from another model's predictions,
//! and what keeps logits from drifting.

use tch::{Kind, Reduction, Tensor};

use super::fused::{has_kernel, made};
use crate::ffi;

/// `-log softmax(logits(hidden))[target]`, summed over all rows: `[n, hidden]`, `[n]` -> f32 scalar.
///
/// The sum, not the mean, so that micro-batches with unlike numbers of supervised tokens add up to the large batch:
/// divide by the number of targets in all of them. Logits, the widest tensor of a step, are made `chunk` rows at a
/// time; with more rows than that each chunk's gradient is taken at once, and the loss returned carries the sum of
/// them, so `logits` must have no trained weights of its own there.
pub fn cross_entropy(hidden: &Tensor, targets: &Tensor, chunk: i64, logits: impl Fn(&Tensor) -> Tensor) -> Tensor {
    in_chunks(hidden, targets, chunk, |hidden, targets| summed_cross_entropy(&logits(hidden), targets))
}

/// [`cross_entropy`] + `z_coefficient` times the sum of what [`z_loss`] is the mean of, from the same logits. Chameleon
/// has a coefficient of 1e-5.
pub fn cross_entropy_and_z_loss(
    hidden: &Tensor,
    targets: &Tensor,
    chunk: i64,
    z_coefficient: f64,
    logits: impl Fn(&Tensor) -> Tensor,
) -> Tensor {
    if z_coefficient == 0.0 {
        return cross_entropy(hidden, targets, chunk, logits);
    }
    in_chunks(hidden, targets, chunk, |hidden, targets| {
        let logits = to_f32(&logits(hidden)); // [rows, vocab]
        summed_cross_entropy(&logits, targets) + squared_log_z(&logits).sum(Kind::Float) * z_coefficient
    })
}

/// `sum over the vocabulary of p (log p - log q)`, summed over all rows, with `p` what the head makes of `teacher` and `q`
/// what it makes of `hidden`: `[n, hidden]` both -> f32 scalar (Kullback and Leibler 1951; `KLDivLoss` with
/// `reduction="sum"`). Nothing goes backward to `teacher`. Chunks as in [`cross_entropy`].
pub fn kl_divergence(hidden: &Tensor, teacher: &Tensor, chunk: i64, logits: impl Fn(&Tensor) -> Tensor) -> Tensor {
    in_chunks(hidden, teacher, chunk, |hidden, teacher| {
        summed_divergence(&tch::no_grad(|| logits(teacher)), &logits(hidden))
    })
}

/// `mean(log^2 Z)` with `Z = sum(exp(logits))` of each row: `[n, vocab]` -> f32 scalar (arXiv 2405.09818, section 2.3).
///
/// Softmax does not see what is added to all logits of a row; this does, and draws `log Z` to 0.
pub fn z_loss(logits: &Tensor) -> Tensor {
    squared_log_z(&to_f32(logits)).mean(Kind::Float)
}

/// A loss that is a sum over rows, `chunk` rows at a time; see [`cross_entropy`].
fn in_chunks(hidden: &Tensor, targets: &Tensor, chunk: i64, loss: impl Fn(&Tensor, &Tensor) -> Tensor) -> Tensor {
    let n = targets.size()[0];
    let chunks = n.max(1).unsigned_abs().div_ceil(chunk.max(1).unsigned_abs());
    let chunk = n.max(1).unsigned_abs().div_ceil(chunks) as i64; // all of one length, but for the last
    if chunks == 1 || !hidden.requires_grad() {
        let starts = (0..n.max(1)).step_by(chunk as usize);
        let parts = starts.map(|start| {
            let rows = chunk.min(n - start);
            loss(&hidden.narrow(0, start, rows), &targets.narrow(0, start, rows))
        });
        return parts.reduce(|a, b| a + b).expect("at least one chunk");
    }
    let mut value = Tensor::zeros([], (Kind::Float, hidden.device()));
    let mut gradients = Vec::new();
    for start in (0..n).step_by(chunk as usize) {
        let rows = chunk.min(n - start);
        let leaf = hidden.narrow(0, start, rows).detach().set_requires_grad(true);
        let loss = loss(&leaf, &targets.narrow(0, start, rows));
        gradients.extend(Tensor::run_backward(&[&loss], &[&leaf], false, false));
        value += loss.detach();
    }
    // A scalar whose value is the loss and whose derivative by `hidden` is the gradient found above.
    let gradient = Tensor::cat(&gradients, 0); // [n, hidden]
    let carrier = (hidden * gradient).sum(Kind::Float);
    value + (&carrier - carrier.detach())
}

fn to_f32(logits: &Tensor) -> Tensor {
    logits.to_kind(Kind::Float)
}

/// `[rows, vocab]`, `[rows]` -> f32 scalar
fn summed_cross_entropy(logits: &Tensor, targets: &Tensor) -> Tensor {
    if has_kernel(logits) {
        // SAFETY: two live tensors.
        return made(ffi::tensor(unsafe { ffi::vora_cross_entropy(logits.as_ptr(), targets.as_ptr()) }));
    }
    plain::cross_entropy(logits, targets)
}

/// `[rows, vocab]` both -> f32 scalar; nothing goes backward to `teacher`
fn summed_divergence(teacher: &Tensor, logits: &Tensor) -> Tensor {
    if has_kernel(logits) {
        // SAFETY: two live tensors.
        return made(ffi::tensor(unsafe { ffi::vora_kl_divergence(teacher.as_ptr(), logits.as_ptr()) }));
    }
    plain::kl_divergence(teacher, logits)
}

/// The same in libtorch's operators.
mod plain {
    use super::*;

    pub(super) fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Tensor {
        to_f32(logits).cross_entropy_loss::<Tensor>(targets, None, Reduction::Sum, -100, 0.0)
    }

    pub(super) fn kl_divergence(teacher: &Tensor, logits: &Tensor) -> Tensor {
        let [p, q] = [teacher, logits].map(|logits| to_f32(logits).log_softmax(-1, Kind::Float));
        q.kl_div(&p, Reduction::Sum, true)
    }
}

/// `[rows, vocab]` -> `[rows]`
fn squared_log_z(logits: &Tensor) -> Tensor {
    logits.logsumexp([-1i64].as_slice(), false).square()
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
    fn divergence_is_its_definition_and_its_gradient() {
        let golden = fixtures::open("losses");
        let head = &golden["ce.lm_head"];
        let logits = |h: &Tensor| h.linear::<&Tensor>(head, None);
        let teacher = &golden["ce.hidden"] * -0.7;
        let n = teacher.size()[0];
        for chunk in [1, 3, 1 << 10] {
            let hidden = golden["ce.hidden"].copy().set_requires_grad(true);
            let loss = kl_divergence(&hidden, &teacher, chunk, logits) / n as f64;
            loss.backward();
            let p = logits(&teacher).to_kind(Kind::Double).softmax(-1, Kind::Double);
            let q = logits(&hidden.detach()).to_kind(Kind::Double).softmax(-1, Kind::Double);
            let expected = (&p * (p.log() - q.log())).sum(Kind::Double) / n as f64;
            fixtures::assert_close_to(&loss, &expected.to_kind(Kind::Float), 1e-5);
            let gradient = (&q - &p).matmul(&head.to_kind(Kind::Double)) / n as f64;
            fixtures::assert_close_to(&hidden.grad(), &gradient.to_kind(Kind::Float), 1e-6);
            let same = kl_divergence(&hidden, &hidden.detach(), chunk, logits);
            assert!(same.double_value(&[]).abs() < 1e-5);
        }
    }

    /// Losses and gradients of the kernels beside those of plain operators, in f32 and in bf16.
    #[test]
    fn kernels_are_what_operators_are() {
        let random = fixtures::Random::new(4);
        // Lengths with and without a rest after whole vectors; rows for more than one thread; rows that are not predicted.
        for (rows, vocab) in [(1, 1), (5, 37), (90, 1024)] {
            for kind in [Kind::Float, Kind::BFloat16] {
                let make = || (random.normal([rows, vocab]) * 6 + 30).to_kind(kind);
                let (teacher, logits, targets) = (make(), make(), random.integers(0, vocab, [rows]));
                let _ = targets.narrow(0, rows / 2, 1).fill_(if rows == 1 { 0 } else { -100 });
                let of = |loss: &dyn Fn(&Tensor) -> Tensor| {
                    let leaf = logits.copy().set_requires_grad(true);
                    let loss = loss(&leaf);
                    (&loss * 0.37).backward();
                    assert_eq!(loss.kind(), Kind::Float);
                    (loss.detach(), leaf.grad())
                };
                let pairs = [
                    (of(&|x| summed_cross_entropy(x, &targets)), of(&|x| plain::cross_entropy(x, &targets))),
                    (of(&|x| summed_divergence(&teacher, x)), of(&|x| plain::kl_divergence(&teacher, x))),
                ];
                for ((loss, grad), (plain_loss, plain_grad)) in pairs {
                    let scale = plain_loss.double_value(&[]).abs().max(1.0);
                    fixtures::assert_close_to(&loss, &plain_loss, 2e-5 * scale);
                    let tolerance = if kind == Kind::Float { 1e-5 } else { 4e-3 };
                    fixtures::assert_close_to(&grad, &plain_grad, tolerance);
                }
            }
        }
    }

    #[test]
    fn extreme_logits_have_finite_losses() {
        let logits = Tensor::from_slice(&[1e30f32, -1e30, 0.0, f32::NEG_INFINITY]).view([1, 4]).set_requires_grad(true);
        let loss = summed_cross_entropy(&logits, &Tensor::from_slice(&[0i64]));
        loss.backward();
        assert_eq!(loss.double_value(&[]), 0.0);
        assert!(logits.grad().abs().max().double_value(&[]) < 1e-37); // e^-87, the least that the kernels tell from others
        let nan =
            summed_cross_entropy(&Tensor::from_slice(&[f32::NAN, 1.0]).view([1, 2]), &Tensor::from_slice(&[1i64]));
        assert!(nan.double_value(&[]).is_nan());
    }

    #[test]
    #[should_panic(expected = "a target 3 among 3 logits")]
    fn a_target_out_of_range_panics_with_both() {
        let _ =
            summed_cross_entropy(&Tensor::zeros([1, 3], (Kind::Float, tch::Device::Cpu)), &Tensor::from_slice(&[3i64]));
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

    #[test]
    fn z_loss_is_the_square_of_log_z() {
        // Z is 1 + 2 + 5 = 8 and 3 e^2.
        let (ln2, ln5) = (2f32.ln(), 5f32.ln());
        let logits = Tensor::from_slice(&[0f32, ln2, ln5, 2.0, 2.0, 2.0]).view([2, 3]).set_requires_grad(true);
        let (first, second) = (8f64.ln(), 3f64.ln() + 2.0);
        let loss = z_loss(&logits);
        fixtures::assert_close_to(&loss, &Tensor::from((first * first + second * second) / 2.0), 1e-6);
        // d/dx mean(log^2 Z) = 2 log Z softmax(x) / n
        loss.backward();
        let expected = [1.0, 2.0, 5.0].map(|e| first * e / 8.0).into_iter().chain([second / 3.0; 3]);
        let expected = Tensor::from_slice(&expected.collect::<Vec<f64>>()).view([2, 3]);
        fixtures::assert_close_to(&logits.grad(), &expected, 1e-6);
        assert_eq!(z_loss(&logits.detach().to_kind(Kind::BFloat16)).kind(), Kind::Float);
    }

    #[test]
    fn both_losses_in_chunks_are_both_losses() {
        let golden = fixtures::open("losses");
        let (targets, head) = (&golden["ce.targets"], &golden["ce.lm_head"]);
        let logits = |hidden: &Tensor| hidden.linear::<&Tensor>(head, None);
        let of = |loss: &dyn Fn(&Tensor) -> Tensor| {
            let hidden = golden["ce.hidden"].copy().set_requires_grad(true);
            let loss = loss(&hidden);
            loss.backward();
            (loss.detach(), hidden.grad())
        };
        let n = targets.size()[0] as f64;
        let apart = of(&|hidden| cross_entropy(hidden, targets, 1 << 10, logits) + z_loss(&logits(hidden)) * 0.3 * n);
        for chunk in [1, 3, 1 << 10] {
            let both = of(&|hidden| cross_entropy_and_z_loss(hidden, targets, chunk, 0.3, logits));
            fixtures::assert_close_to(&both.0, &apart.0, 1e-4);
            fixtures::assert_close_to(&both.1, &apart.1, 1e-5);
        }
    }
}
