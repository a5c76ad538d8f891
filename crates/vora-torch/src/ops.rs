//! Operators that tch does not bind.

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

/// The 2-norm over all elements of all `grads`, as a 0-dim f32 tensor: nothing is copied to the host.
pub fn grad_norm(grads: &[Tensor]) -> Result<Tensor> {
    ensure!(!grads.is_empty(), "grad_norm of no tensors");
    let pointers = ffi::pointers(grads);
    // SAFETY: a list of live tensors.
    ffi::tensor(unsafe { ffi::vora_grad_norm(pointers.as_ptr(), pointers.len()) })
}

/// Multiplies all `tensors` by `factor`, in place and in one call; a factor of 0 makes zeros of whatever they hold.
pub fn scale(tensors: &[Tensor], factor: f64) -> Result<()> {
    if tensors.is_empty() {
        return Ok(());
    }
    let pointers = ffi::pointers(tensors);
    // SAFETY: a list of live tensors.
    ffi::check(unsafe { ffi::vora_scale(pointers.as_ptr(), pointers.len(), factor) })
}

/// Adds to the gradients of all leaves behind `tensor` what follows from `gradient`, that by `tensor` itself.
///
/// # Errors
/// Where no leaf behind `tensor` requires a gradient, or the two differ in shape.
pub fn backward(tensor: &Tensor, gradient: &Tensor) -> Result<()> {
    // SAFETY: two live tensors.
    ffi::check(unsafe { ffi::vora_backward(tensor.as_ptr(), gradient.as_ptr()) })
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
    fn scaled_in_place() {
        let tensors = [Tensor::from_slice(&[1f32, -2.0]), Tensor::from_slice(&[f32::NAN, 4.0])];
        scale(&tensors, 0.5).unwrap();
        assert_eq!(Vec::<f32>::try_from(&tensors[0]).unwrap(), [0.5, -1.0]);
        assert_eq!(tensors[1].double_value(&[1]), 2.0);
        scale(&tensors, 0.0).unwrap();
        assert_eq!(Vec::<f32>::try_from(&tensors[1]).unwrap(), [0.0, 0.0]);
        scale(&[], 2.0).unwrap();
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

    #[test]
    fn backward_starts_from_the_gradient_given() {
        let x = Tensor::from_slice(&[1f32, 2.0, 3.0]).set_requires_grad(true);
        for _ in 0..2 {
            backward(&x.square(), &Tensor::from_slice(&[1f32, 10.0, 100.0])).unwrap();
        }
        assert_eq!(Vec::<f32>::try_from(x.grad()).unwrap(), [4.0, 80.0, 1200.0]);
        let error = backward(&x.detach(), &x).unwrap_err().to_string();
        assert!(error.contains("does not require grad"), "{error}");
    }

    #[test]
    fn grad_norm_spans_all_tensors() {
        let grads = [Tensor::from_slice(&[3f32, 0.0]), Tensor::from_slice(&[0f32, 4.0, 0.0])];
        assert_eq!(grad_norm(&grads).unwrap().double_value(&[]), 5.0);
        assert!(grad_norm(&[]).is_err());
    }
}
