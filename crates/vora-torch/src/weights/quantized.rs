//! A frozen weight kept in four or eight bits, as bitsandbytes or ggml define them, and the product with it.
//!
//! The numbers of [`Quantization::Nf4`] and [`Quantization::Int8`] are those of bitsandbytes where it takes the nearest code, as its CUDA kernels do. Its library for the CPU
//! looks codes of the nested scales up in a coarser table, and takes the one beside the nearest in two of a thousand.

use std::ptr;

use anyhow::Result;
use tch::{Kind, Tensor};

use crate::error;
use crate::ffi;
use crate::packed::{PackedLinear, Width};
use crate::weights::pack_quantized;

/// Into how few bits a weight is brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// Four bits, the 16 quantiles of a normal distribution (QLoRA, arXiv 2305.14314), in blocks of 64 scaled by their
    /// largest magnitude. These scales are in turn kept in eight bits around their mean, in blocks of 256: 4.13 bits a
    /// weight. HF's `bnb_4bit_quant_type: nf4` with `bnb_4bit_use_double_quant: true`.
    Nf4,
    /// Eight bits, integers scaled by the largest magnitude of their row: the weights of LLM.int8 (arXiv 2208.07339).
    /// The product is with the weight made whole again: activations are not quantized, so no outliers are taken apart.
    Int8,
    /// Eight bits, and an f16 scale for every 32 numbers of a row: [`Width::Int8`], which decoding reads as it is.
    Int8Groups,
    /// Four bits, and an f16 scale for every 32 numbers of a row: [`Width::Int4`], which decoding reads as it is.
    Int4Groups,
}

impl Quantization {
    /// The width that decoding has it in; none for bitsandbytes' own.
    pub fn width(self) -> Option<Width> {
        match self {
            Self::Nf4 | Self::Int8 => None,
            Self::Int8Groups => Some(Width::Int8),
            Self::Int4Groups => Some(Width::Int4),
        }
    }

    /// What has this width; none for those that are not quantised.
    pub fn of_width(width: Width) -> Option<Self> {
        [Self::Int8Groups, Self::Int4Groups].into_iter().find(|quantization| quantization.width() == Some(width))
    }
}

/// The values of NF4's codes (appendix E of arXiv 2305.14314).
#[allow(clippy::excessive_precision, reason = "as they are published")]
const NF4: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

const BLOCK: i64 = 64;
const NESTED_BLOCK: i64 = 256;

/// Below every magnitude that f32 divides by without overflow.
const TINY: f64 = 1e-38;

/// A weight `[out, in]` in few bits.
#[derive(Debug)]
pub struct QuantizedWeight {
    quantization: Quantization,
    shape: [i64; 2],
    kind: Kind,
    kept: Kept,
}

#[derive(Debug)]
enum Kept {
    Parts(Vec<Tensor>), // as csrc/quantized.cpp lists them
    Packed(PackedLinear),
}

impl QuantizedWeight {
    /// Quantizes `weight` `[out, in]`, on the device that it is on.
    ///
    /// # Errors
    /// Where it is no matrix, or memory is short; in groups, what [`PackedLinear::new`] refuses.
    pub fn new(weight: &Tensor, quantization: Quantization) -> Result<Self> {
        let (rows, columns) = weight.size2()?;
        let kept = tch::no_grad(|| match (quantization, quantization.width()) {
            (_, Some(width)) => Ok(Kept::Packed(PackedLinear::new(weight, width)?)),
            (Quantization::Nf4, None) => nf4(weight).map(Kept::Parts).map_err(error::clean),
            (_, None) => int8(weight).map(Kept::Parts).map_err(error::clean),
        })?;
        Ok(Self { quantization, shape: [rows, columns], kind: weight.kind(), kept })
    }

    /// Takes one that is quantised in groups already, for a model in this dtype; none in another [`Width`].
    pub fn from_packed(packed: PackedLinear, kind: Kind) -> Option<Self> {
        let quantization = Quantization::of_width(packed.width())?;
        let shape = [packed.out_features(), packed.in_features()];
        Some(Self { quantization, shape, kind, kept: Kept::Packed(packed) })
    }

    /// As decoding reads it, where it is kept in groups.
    pub fn packed(&self) -> Option<&PackedLinear> {
        match &self.kept {
            Kept::Packed(packed) => Some(packed),
            Kept::Parts(_) => None,
        }
    }

    /// What `compressed-tensors` stores it as, where it is kept in groups, by the ends of the names: `weight` becomes
    /// `weight_packed` i32 `[out, words]`, `weight_scale` f16 `[out, groups]` and `weight_shape` i64 `[2]`.
    ///
    /// # Errors
    /// Where memory is short.
    pub fn stored(&self) -> Result<Option<[(&'static str, Tensor); 3]>> {
        self.packed().map(pack_quantized::write).transpose()
    }

    /// How it is kept.
    pub fn quantization(&self) -> Quantization {
        self.quantization
    }

    /// `[out, in]`
    pub fn size(&self) -> [i64; 2] {
        self.shape
    }

    /// The dtype that it had.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The bytes that it is kept in.
    pub fn num_bytes(&self) -> u64 {
        match &self.kept {
            Kept::Parts(parts) => {
                parts.iter().map(|part| (part.numel() * part.kind().elt_size_in_bytes()) as u64).sum()
            }
            Kept::Packed(packed) => packed.num_bytes() as u64,
        }
    }

    /// The weight that its bits stand for, in this dtype: computed in f32, rounded once. `[out, in]`
    ///
    /// # Panics
    /// Where libtorch has no room for it.
    pub fn dequantized(&self, kind: Kind) -> Tensor {
        let [rows, columns] = self.shape;
        let made = match &self.kept {
            Kept::Parts(parts) => {
                let parts = ffi::pointers(parts);
                // SAFETY: live tensors, as many as said.
                ffi::tensor(unsafe {
                    ffi::vora_dequantize(parts.as_ptr(), parts.len(), rows, columns, ffi::scalar_type(kind))
                })
            }
            Kept::Packed(packed) => {
                let own = if kind == Kind::BFloat16 { kind } else { Kind::Float };
                packed.dequantise(0..rows, own).map(|whole| whole.to_kind(kind))
            }
        };
        made.unwrap_or_else(|e| panic!("{e:#}"))
    }

    /// `x W^T + b`: `[.., in]`, `[out]` -> `[.., out]`, with gradients for `x` and `b`. The weight is dequantized to the
    /// dtype of `x` for this product, and once more for its gradient. Where it is in groups and no gradient is asked for, `x` is
    /// rounded to eight bits in groups of 32 instead, as decoding has it: [`PackedLinear::forward`].
    ///
    /// # Panics
    /// Where the shapes do not fit.
    pub fn linear(&self, x: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let [rows, columns] = self.shape;
        let parts = match &self.kept {
            Kept::Parts(parts) => parts,
            Kept::Packed(packed) if !x.requires_grad() && bias.is_none_or(|bias| !bias.requires_grad()) => {
                let y = packed.forward(x).unwrap_or_else(|e| panic!("{e:#}"));
                return match bias {
                    Some(bias) => y + bias,
                    None => y,
                };
            }
            Kept::Packed(_) => return x.linear(&self.dequantized(x.kind()), bias),
        };
        let (parts, bias) = (ffi::pointers(parts), bias.map_or(ptr::null(), Tensor::as_ptr));
        // SAFETY: live tensors, as many as said, and a bias that is alive or null.
        let made = unsafe { ffi::vora_quantized_linear(x.as_ptr(), bias, parts.as_ptr(), parts.len(), rows, columns) };
        ffi::tensor(made).unwrap_or_else(|e| panic!("{e:#}"))
    }
}

/// `[out, in]` -> codes `[(out * in + 1) / 2]`, scales `[blocks]`, and of the scales their own `[blocks / 256]`, the mean
/// `[]`, the values of their codes `[256]`; and a byte's two values `[256, 2]`
fn nf4(weight: &Tensor) -> Result<Vec<Tensor>, tch::TchError> {
    let (device, n) = (weight.device(), weight.numel() as i64);
    let values = Tensor::from_slice(&NF4).to_device(device);
    let (codes, scales) = nearest(&weight.f_reshape([-1])?.to_kind(Kind::Float), &values, BLOCK)?;
    let halves = codes.view([-1, 2]); // of a byte: high, low
    let packed = (halves.select(1, 0) * 16 + halves.select(1, 1)).to_kind(Kind::Uint8).narrow(0, 0, (n + 1) / 2);
    let offset = scales.f_mean(Kind::Float)?;
    let map = dynamic_map()?.to_device(device);
    let (codes, nested) = nearest(&(&scales - &offset), &map, NESTED_BLOCK)?;
    let scale_codes = codes.narrow(0, 0, scales.size()[0]).copy(); // without what fills the last block
    let grid = [values.view([16, 1]).expand([16, 16], false), values.view([1, 16]).expand([16, 16], false)];
    let pairs = Tensor::f_stack(&grid, -1)?.view([256, 2]).contiguous();
    Ok(vec![packed.copy(), scale_codes, nested, offset, map, pairs])
}

/// Of each block of `x` `[n]`, scaled by its largest magnitude, the nearest of the sorted `values`:
/// u8 `[blocks * block]`, filled up with the code of 0, and f32 `[blocks]`
fn nearest(x: &Tensor, values: &Tensor, block: i64) -> Result<(Tensor, Tensor), tch::TchError> {
    let n = x.size()[0];
    let blocks = x.f_constant_pad_nd([0, (block - n % block) % block])?.view([-1, block]);
    let scales = blocks.abs().amax([1], false);
    let scaled = (&blocks * scales.clamp_min(TINY).reciprocal().unsqueeze(1)).clamp_(-1, 1);
    let last = values.size()[0] - 1;
    let middles: Tensor = (values.narrow(0, 0, last) + values.narrow(0, 1, last)) / 2;
    let codes = scaled.f_bucketize(&middles, true, false)?.to_kind(Kind::Uint8);
    Ok((codes.view([-1]), scales))
}

/// The values of the eight-bit codes of scales, `[256]`, sorted: 0, 1, and of each sign in seven decades 1, 2, .. 64
/// evenly spread ones ("dynamic tree quantization", arXiv 2110.02861).
fn dynamic_map() -> Result<Tensor, tch::TchError> {
    let mut parts = vec![Tensor::from_slice(&[0f32, 1.0])];
    for exponent in 0..7 {
        let count = 1i64 << exponent;
        let edges = Tensor::f_linspace(0.1, 1.0, count + 1, (Kind::Float, tch::Device::Cpu))?;
        let middles = (edges.narrow(0, 0, count) + edges.narrow(0, 1, count)) / 2;
        let values: Tensor = middles * 10f64.powi(exponent - 6);
        parts.extend([-&values, values]);
    }
    Ok(Tensor::f_cat(&parts, 0)?.sort(0, false).0)
}

/// `[out, in]` -> i8 `[out, in]`, f32 `[out]`. As bitsandbytes it goes by f16.
fn int8(weight: &Tensor) -> Result<Vec<Tensor>, tch::TchError> {
    let weight = weight.f_to_kind(Kind::Half)?.to_kind(Kind::Float);
    let scales = weight.abs().amax([1], false);
    let inverse: Tensor = 127.0 / scales.clamp_min(1e-30); // a row of zeros has codes 0
    let codes = (weight * inverse.unsqueeze(1)).round_().to_kind(Kind::Int8);
    Ok(vec![codes, scales])
}

#[cfg(test)]
mod tests {
    use fixtures::{assert_close_to, open};
    use tch::Device;

    use super::*;

    /// NF4 of a golden case.
    const CASES: [&str; 5] = ["nf4", "two_nested", "part_of_a_block", "bf16", "zeros"];

    fn parts(weight: &QuantizedWeight) -> &[Tensor] {
        match &weight.kept {
            Kept::Parts(parts) => parts,
            Kept::Packed(_) => &[],
        }
    }

    #[test]
    fn nf4_has_the_bytes_of_the_reference() {
        let golden = open("nf4");
        assert!(dynamic_map().unwrap().equal(&golden["map"]));
        assert!(Tensor::from_slice(&NF4).equal(&golden["table"]));
        for case in CASES {
            let get = |name: &str| &golden[&format!("{case}.{name}")];
            let made = QuantizedWeight::new(get("weight"), Quantization::Nf4).unwrap();
            let [codes, scales, nested, offset] = [0, 1, 2, 3].map(|part| &parts(&made)[part]);
            assert!(codes.equal(get("codes")) && scales.equal(get("scales")), "{case}");
            // A mean adds in the order of the instruction set.
            assert_close_to(offset, get("offset"), 1e-7);
            assert_close_to(nested, get("nested"), 2e-7);
        }
    }

    /// From the reference's own parts, since a mean may end in another bit.
    #[test]
    fn nf4_dequantizes_bit_for_bit() {
        let golden = open("nf4");
        for case in CASES {
            let get = |name: &str| golden[&format!("{case}.{name}")].shallow_clone();
            let mut made = QuantizedWeight::new(&get("weight"), Quantization::Nf4).unwrap();
            for (part, name) in ["codes", "scales", "nested", "offset"].into_iter().enumerate() {
                let Kept::Parts(parts) = &mut made.kept else { unreachable!("bitsandbytes' own") };
                parts[part] = get(name);
            }
            let found = made.dequantized(made.kind());
            assert!(found.equal(&get("dequantized")), "{case}");
            // What a GPU takes, here by way of f64's lack of a kernel: the same in libtorch's operators.
            assert!(
                made.dequantized(Kind::Double).equal(&made.dequantized(Kind::Float).to_kind(Kind::Double)),
                "{case}"
            );
            assert!(made.dequantized(Kind::BFloat16).equal(&made.dequantized(Kind::Float).to_kind(Kind::BFloat16)));
        }
    }

    #[test]
    fn int8_has_the_bytes_of_the_reference() {
        let golden = open("nf4");
        let made = QuantizedWeight::new(&golden["int8.weight"], Quantization::Int8).unwrap();
        let [codes, scales] = [0, 1].map(|part| &parts(&made)[part]);
        assert!(codes.equal(&golden["int8.codes"]) && scales.equal(&golden["int8.scales"]));
        assert!(made.dequantized(Kind::Float).equal(&golden["int8.dequantized"]));
        for kind in [Kind::Double, Kind::BFloat16] {
            assert!(made.dequantized(kind).equal(&golden["int8.dequantized"].to_kind(kind)), "{kind:?}");
        }
    }

    #[test]
    fn a_weight_takes_its_few_bits() {
        let weight = fixtures::Random::new(1).normal([512, 512]);
        let bits = |quantization| {
            let made = QuantizedWeight::new(&weight, quantization).unwrap();
            assert_eq!((made.size(), made.kind(), made.quantization()), ([512, 512], Kind::Float, quantization));
            let error = (made.dequantized(Kind::Float) - &weight).square().mean(Kind::Float).sqrt().double_value(&[]);
            (made.num_bytes() as f64 * 8.0 / (512.0 * 512.0), error)
        };
        let (four, eight) = (bits(Quantization::Nf4), bits(Quantization::Int8));
        assert!(four.0 > 4.125 && four.0 < 4.25 && eight.0 > 8.0 && eight.0 < 8.1, "{four:?} {eight:?}");
        assert!(four.1 < 0.1 && eight.1 < 0.01, "{four:?} {eight:?}");
        let (four, eight) = (bits(Quantization::Int4Groups), bits(Quantization::Int8Groups));
        assert_eq!((four.0, eight.0), (4.5, 8.5));
        assert!(four.1 < 0.1 && eight.1 < 0.006, "{four:?} {eight:?}");
    }

    #[test]
    fn its_linear_is_that_of_the_weight_made_whole() {
        let random = fixtures::Random::new(2);
        for (quantization, kind) in [
            (Quantization::Nf4, Kind::Float),
            (Quantization::Int8, Kind::Float),
            (Quantization::Nf4, Kind::BFloat16),
            (Quantization::Int8, Kind::BFloat16),
            (Quantization::Int8Groups, Kind::Float),
            (Quantization::Int4Groups, Kind::BFloat16),
        ] {
            let kept = QuantizedWeight::new(&(random.normal([6, 20]) * 0.1).to_kind(kind), quantization).unwrap();
            let weight = kept.dequantized(kind);
            for shape in [&[20][..], &[3, 20], &[2, 3, 20]] {
                let x = random.normal(shape).to_kind(kind);
                let bias = random.normal([6]).to_kind(kind);
                let run = |y: &dyn Fn(&Tensor, &Tensor) -> Tensor| {
                    let leaves = [&x, &bias].map(|t| t.copy().set_requires_grad(true));
                    let y = y(&leaves[0], &leaves[1]);
                    y.square().sum(Kind::Float).backward();
                    [y.detach(), leaves[0].grad(), leaves[1].grad()]
                };
                let found = run(&|x, bias| kept.linear(x, Some(bias)));
                let expected = run(&|x, bias| x.linear(&weight, Some(bias)));
                let tolerance = if kind == Kind::Float { 1e-6 } else { 2e-2 };
                for (found, expected) in found.iter().zip(&expected) {
                    assert_eq!(found.kind(), kind);
                    assert_close_to(found, expected, tolerance);
                }
            }
            let x = random.normal([3, 20]).to_kind(kind);
            let y = kept.linear(&x, Some(&random.normal([6]).to_kind(kind)));
            assert_eq!((y.size(), y.kind(), y.requires_grad()), (vec![3, 6], kind, false));
            let (found, expected) = (kept.linear(&x, None), x.linear(&weight, None::<&Tensor>));
            assert_close_to(&found, &expected, if quantization.width().is_some() { 2e-2 } else { 0.0 });
            let x = x.set_requires_grad(true);
            let y = kept.linear(&x, None);
            assert!(y.equal(&x.linear(&weight, None::<&Tensor>)));
            y.sum(Kind::Float).backward();
            assert!(x.grad().defined());
        }
    }

    #[test]
    #[should_panic(expected = "a linear of 20 features takes [2, 19]")]
    fn a_wrong_shape_panics_with_both() {
        let kept = QuantizedWeight::new(&fixtures::Random::new(2).normal([6, 20]), Quantization::Nf4).unwrap();
        let _ = kept.linear(&Tensor::zeros([2, 19], (Kind::Float, Device::Cpu)), None);
    }

    #[test]
    fn what_is_no_matrix_is_an_error() {
        let vector = Tensor::zeros([4], (Kind::Float, Device::Cpu));
        assert!(QuantizedWeight::new(&vector, Quantization::Nf4).is_err());
    }
}
