//! One fused AdamW step.

use anyhow::{Result, ensure};
use tch::Tensor;

use crate::ffi;

/// Hyper-parameters of one AdamW step (Loshchilov & Hutter 2019).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the running mean of gradients.
    pub beta1: f64,
    /// Decay of the running mean of squared gradients.
    pub beta2: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Added to the denominator.
    pub eps: f64,
}

/// One fused AdamW step over all `params`, in place, as `torch.optim.AdamW(fused=True)` does it.
///
/// All lists have the same length; `steps` are 0-dim f32 tensors that count the steps taken and are increased
/// by the caller before the call.
///
/// # Errors
/// Where the lists differ in length, or in what libtorch expects of their tensors.
pub fn fused_adamw(
    params: &[Tensor],
    grads: &[Tensor],
    exp_avgs: &[Tensor],
    exp_avg_sqs: &[Tensor],
    steps: &[Tensor],
    adamw: AdamW,
) -> Result<()> {
    let n = params.len();
    ensure!(
        [grads.len(), exp_avgs.len(), exp_avg_sqs.len(), steps.len()].iter().all(|&len| len == n),
        "fused_adamw: the lists differ in length"
    );
    if n == 0 {
        return Ok(());
    }
    let (p, g, m, v, s) = (
        ffi::pointers(params),
        ffi::pointers(grads),
        ffi::pointers(exp_avgs),
        ffi::pointers(exp_avg_sqs),
        ffi::pointers(steps),
    );
    let AdamW { lr, beta1, beta2, weight_decay, eps } = adamw;
    // SAFETY: five lists of n live tensors each.
    ffi::check(unsafe {
        ffi::vora_fused_adamw(
            p.as_ptr(),
            g.as_ptr(),
            m.as_ptr(),
            v.as_ptr(),
            s.as_ptr(),
            n,
            lr,
            beta1,
            beta2,
            weight_decay,
            eps,
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// AdamW from its formula, one tensor at a time.
    fn reference_step(p: &Tensor, g: &Tensor, m: &Tensor, v: &Tensor, step: i32, a: AdamW) -> [Tensor; 3] {
        let p = p * (1.0 - a.lr * a.weight_decay);
        let m = m * a.beta1 + g * (1.0 - a.beta1);
        let v = v * a.beta2 + g.square() * (1.0 - a.beta2);
        let m_hat = &m / (1.0 - a.beta1.powi(step));
        let v_hat = &v / (1.0 - a.beta2.powi(step));
        let p = p - m_hat / (v_hat.sqrt() + a.eps) * a.lr;
        [p, m, v]
    }

    #[test]
    fn fused_adamw_is_adamw() {
        let random = fixtures::Random::new(1);
        let adamw = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.98, weight_decay: 0.1, eps: 1e-8 };
        let shapes: [&[i64]; 3] = [&[5, 7], &[3], &[2, 2, 2]];
        let params: Vec<Tensor> = shapes.iter().map(|s| random.normal(*s)).collect();
        let zeros = || params.iter().map(Tensor::zeros_like).collect::<Vec<_>>();
        let (exp_avgs, exp_avg_sqs) = (zeros(), zeros());
        let steps: Vec<Tensor> = params.iter().map(|_| Tensor::from(0f32)).collect();
        let mut expected: Vec<[Tensor; 3]> =
            params.iter().map(|p| [p.copy(), p.zeros_like(), p.zeros_like()]).collect();

        for step in 1..=4 {
            let grads: Vec<Tensor> = shapes.iter().map(|s| random.normal(*s)).collect();
            for s in &steps {
                let _ = s.shallow_clone().fill_(f64::from(step));
            }
            fused_adamw(&params, &grads, &exp_avgs, &exp_avg_sqs, &steps, adamw).unwrap();
            for (state, g) in expected.iter_mut().zip(&grads) {
                *state = reference_step(&state[0], g, &state[1], &state[2], step, adamw);
            }
        }
        for (i, [p, m, v]) in expected.iter().enumerate() {
            for (ours, theirs) in [(&params[i], p), (&exp_avgs[i], m), (&exp_avg_sqs[i], v)] {
                let difference = (ours - theirs).abs().max().double_value(&[]);
                assert!(difference < 1e-6, "tensor {i}: {difference}");
            }
        }
    }
}
