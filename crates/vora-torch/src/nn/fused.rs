//! What a transformer does between its matrix products, in one pass forward and one backward each on the CPU.
//!
//! Each function has a kernel for f32 and bf16 on the CPU and says the same in plain operators for every other case.
//! The kernels compute in f32 and round once where they write.

use tch::{Device, Kind, Tensor};

use crate::ffi;

/// Whether the kernels serve a tensor.
pub(super) fn has_kernel(x: &Tensor) -> bool {
    x.device() == Device::Cpu && matches!(x.kind(), Kind::Float | Kind::BFloat16)
}

/// What a kernel made; it fails only where shapes or dtypes are not those in its caller's doc comment.
pub(super) fn made(tensor: anyhow::Result<Tensor>) -> Tensor {
    tensor.unwrap_or_else(|e| panic!("{e:#}"))
}

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension: `[.., hidden]`, `[hidden]` -> `[.., hidden]`
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let weight = weight.to_kind(x.kind());
    if has_kernel(x) {
        // SAFETY: two live tensors.
        return made(ffi::tensor(unsafe { ffi::vora_rms_norm(x.as_ptr(), weight.as_ptr(), eps) }));
    }
    if x.device().is_cuda() {
        return x.rms_norm(weight.size(), Some(&weight), eps);
    }
    plain::rms_norm(x, &weight, eps)
}

/// `silu(gate) * up`, element by element.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
    if has_kernel(gate) {
        // SAFETY: two live tensors.
        return made(ffi::tensor(unsafe { ffi::vora_swiglu(gate.as_ptr(), up.as_ptr()) }));
    }
    plain::swiglu(gate, up)
}

/// Turns the halves of every head into each other by its position's angles (rotary embedding, Su et al. 2021):
/// `[batch, seq, heads, head_dim]`, twice `[batch, seq, head_dim / 2]` in f32 -> `[batch, seq, heads, head_dim]`
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    if has_kernel(x) {
        // SAFETY: three live tensors.
        return made(ffi::tensor(unsafe { ffi::vora_rotate(x.as_ptr(), cos.as_ptr(), sin.as_ptr()) }));
    }
    plain::rotate(x, cos, sin)
}

/// The same in libtorch's operators.
mod plain {
    use super::*;

    pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
        let x32 = x.to_kind(Kind::Float);
        let mean_square = x32.square().mean_dim(-1, true, Kind::Float); // [.., 1]
        (x32 * (mean_square + eps).rsqrt()).to_kind(x.kind()) * weight
    }

    pub(super) fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
        gate.silu() * up
    }

    pub(super) fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
        let halves = x.chunk(2, -1);
        let (a, b) = (&halves[0], &halves[1]); // [batch, seq, heads, head_dim / 2]
        let table = |t: &Tensor| t.to_kind(x.kind()).unsqueeze(2); // [batch, seq, 1, head_dim / 2]
        let (cos, sin) = (table(cos), table(sin));
        Tensor::cat(&[a * &cos - b * &sin, b * &cos + a * &sin], -1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

    /// Compares outputs and gradients of two functions of the same tensors, in f32 and in bf16.
    fn same(shapes: &[&[i64]], found: impl Fn(&[Tensor]) -> Tensor, expected: impl Fn(&[Tensor]) -> Tensor) {
        for (kind, tolerance) in [(Kind::Float, 2e-5), (Kind::BFloat16, 6e-2)] {
            let random = fixtures::Random::new(1);
            let values: Vec<Tensor> = shapes.iter().map(|s| (random.normal(*s) * 2).to_kind(kind)).collect();
            let run = |f: &dyn Fn(&[Tensor]) -> Tensor, kind: Kind| {
                let leaves: Vec<Tensor> =
                    values.iter().map(|t| t.to_kind(kind).copy().set_requires_grad(true)).collect();
                let y = f(&leaves);
                assert_eq!(y.kind(), kind);
                let grad_y = Tensor::linspace(-1, 1, y.numel() as i64, F32).view(&y.size()[..]).to_kind(kind);
                (&y * grad_y).sum(Kind::Float).backward();
                leaves.iter().map(Tensor::grad).chain([y]).map(|t| t.to_kind(Kind::Float)).collect::<Vec<_>>()
            };
            // The reference in f32: the kernels round once where plain operators round several times.
            for (found, expected) in run(&found, kind).iter().zip(run(&expected, Kind::Float)) {
                let scale = expected.abs().max().double_value(&[]).max(1.0);
                fixtures::assert_close_to(found, &expected, tolerance * scale);
            }
        }
    }

    #[test]
    fn rms_norm_is_what_it_says() {
        // Lengths with and without a rest after whole vectors; rows for more than one thread.
        for shape in [vec![2, 3, 37], vec![1, 576], vec![300, 128]] {
            let hidden = [*shape.last().unwrap()];
            same(&[&shape, &hidden], |t| rms_norm(&t[0], &t[1], 1e-5), |t| plain::rms_norm(&t[0], &t[1], 1e-5));
        }
        let strided = fixtures::Random::new(1).normal([8, 5]).tr();
        let weight = Tensor::ones([8], F32);
        fixtures::assert_close(&rms_norm(&strided, &weight, 0.0), &plain::rms_norm(&strided, &weight, 0.0));
        let empty = Tensor::zeros([0, 8], F32);
        assert_eq!(rms_norm(&empty, &weight, 0.0).size(), [0, 8]);
    }

    #[test]
    fn swiglu_is_what_it_says() {
        for shape in [vec![3, 37], vec![200, 512]] {
            same(&[&shape, &shape], |t| swiglu(&t[0], &t[1]), |t| plain::swiglu(&t[0], &t[1]));
        }
        let extreme = Tensor::from_slice(&[-1e30f32, -200.0, -88.0, -20.0, -0.0, 1e-30, 20.0, 88.0, 200.0, 1e30]);
        let one = Tensor::ones([10], F32);
        let (found, expected) = (swiglu(&extreme, &one), extreme.silu());
        assert!(bool::try_from(found.isfinite().all()).unwrap());
        let relative = ((&found - &expected) / (expected.abs() + 1e-6)).abs().max().double_value(&[]);
        assert!(relative < 1e-5, "{found:?}");
        let nan = swiglu(&Tensor::from_slice(&[f32::NAN]), &Tensor::ones([1], F32));
        assert!(nan.double_value(&[0]).is_nan());
    }

    #[test]
    fn rotate_is_what_it_says() {
        let random = fixtures::Random::new(2);
        for (batch, seq, heads, head_dim) in [(2, 5, 3, 6), (2, 150, 9, 64)] {
            let angles = random.normal([batch, seq, head_dim / 2]);
            let (cos, sin) = (angles.cos(), angles.sin());
            same(
                &[&[batch, seq, heads, head_dim]],
                |t| rotate(&t[0], &cos, &sin),
                |t| plain::rotate(&t[0], &cos, &sin),
            );
            // Gradients come in whatever layout attention leaves.
            same(
                &[&[batch, heads, seq, head_dim]],
                |t| rotate(&t[0].transpose(1, 2), &cos, &sin).transpose(1, 2),
                |t| plain::rotate(&t[0].transpose(1, 2), &cos, &sin).transpose(1, 2),
            );
        }
    }

    #[test]
    #[should_panic(expected = "swiglu of [2] and [3]")]
    fn a_wrong_shape_panics_with_both() {
        let _ = swiglu(&Tensor::zeros([2], F32), &Tensor::zeros([3], F32));
    }
}
