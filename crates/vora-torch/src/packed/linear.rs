//! `PackedLinear`: a linear layer's weight as decoding reads it.

use std::ffi::c_void;
use std::ops::Range;
use std::ptr;

use anyhow::{Context, Result, bail, ensure};
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use super::lora_id::LoraId;
use super::width::Width;
use crate::checkpoint::forget_view;
use crate::ffi::{self, decode as raw};

/// Numbers that share a scale.
const GROUP: i64 = 32;

/// `y = x W^T + b`, and for each row `+ scaling * (x A^T) B^T` of its adapter, on the CPU.
///
/// [`Width::F32`] and [`Width::Bf16`] read the weight where it lies, if it has that dtype already: it is shared, not copied.
/// The quantised widths keep a copy in another order.
#[derive(Debug)]
pub struct PackedLinear {
    width: Width,
    out_features: i64,
    in_features: i64,
    values: Tensor,         // [out, in], or as csrc/decode/kernel.h has quantised ones
    scales: Option<Tensor>, // f16
    is_copy: bool,
    bias: Option<Tensor>, // [out], f32
    bias_is_adapted: bool,
    loras: Vec<Option<[Tensor; 2]>>, // by `LoraId::place`, A [r, in] and B [out, r], f32 or bf16, B with its scaling
    raw_loras: RawLoras,
}

/// What `csrc/` takes of the adapters.
#[derive(Debug, Default)]
struct RawLoras(Vec<raw::Lora>);

// SAFETY: it points into tensors that lie beside it, which are `Send`, and is read in a step alone.
unsafe impl Send for RawLoras {}

impl PackedLinear {
    /// Packs a weight `[out, in]`, f32 or bf16. Of one that is a view of a checkpoint, and quantised here, the memory that it was
    /// read into is given back: see [`forget_view`].
    ///
    /// # Errors
    /// A weight of another shape or dtype, or on another device; quantised, one with numbers that are not finite or too large.
    pub fn new(weight: &Tensor, width: Width) -> Result<Self> {
        let weight = weight.detach();
        let size = weight.size();
        ensure!(
            size.len() == 2 && size.iter().all(|&n| n > 0) && weight.device() == Device::Cpu,
            "packing takes a weight [out, in] on the CPU, this is {size:?} on {:?}",
            weight.device()
        );
        ensure!(
            matches!(weight.kind(), Kind::Float | Kind::BFloat16),
            "packing takes a weight in f32 or bf16, this is {:?}",
            weight.kind()
        );
        if width.is_quantised() {
            let [values, scales] = quantise(&weight, width)?;
            return Ok(Self::of(width, [size[0], size[1]], values, Some(scales), true));
        }
        let kind = if width == Width::F32 { Kind::Float } else { Kind::BFloat16 };
        let values = weight.to_kind(kind).contiguous();
        let is_copy = values.data_ptr() != weight.data_ptr();
        Ok(Self::of(width, [size[0], size[1]], values, None, is_copy))
    }

    /// Takes what is quantised already, as [`PackedLinear::parts`] gives it: values `[out, groups, 32]` int8 or
    /// `[out, groups, 16]` uint8, scales `[out, groups]` f16, where `groups` is `in_features / 32` rounded up.
    ///
    /// # Errors
    /// Other shapes and dtypes.
    pub fn from_parts(values: &Tensor, scales: &Tensor, in_features: i64) -> Result<Self> {
        let (width, bytes) = match values.kind() {
            Kind::Int8 => (Width::Int8, GROUP),
            Kind::Uint8 => (Width::Int4, GROUP / 2),
            other => bail!("quantised values are {other:?}, int8 or uint8 (two of 4 bits) was expected"),
        };
        let out_features = values.size().first().copied().unwrap_or(0);
        let groups = (in_features + GROUP - 1) / GROUP;
        ensure!(
            values.size() == [out_features, groups, bytes]
                && scales.size() == [out_features, groups]
                && out_features > 0,
            "quantised values {:?} with scales {:?} are not [out, {groups}, {bytes}] and [out, {groups}], which \
             {in_features} inputs take",
            values.size(),
            scales.size()
        );
        ensure!(scales.kind() == Kind::Half, "scales are {:?}, f16 was expected", scales.kind());
        let [values, scales] = two_of(|a, b| {
            // SAFETY: two live tensors, and two places for the results.
            unsafe { ffi::vora_pack(values.as_ptr(), scales.as_ptr(), a, b) }
        })?;
        Ok(Self::of(width, [out_features, in_features], values, Some(scales), true))
    }

    fn of(
        width: Width,
        [out_features, in_features]: [i64; 2],
        values: Tensor,
        scales: Option<Tensor>,
        is_copy: bool,
    ) -> Self {
        let (bias, loras, raw_loras) = (None, Vec::new(), RawLoras::default());
        let bias_is_adapted = false;
        Self { width, out_features, in_features, values, scales, is_copy, bias, bias_is_adapted, loras, raw_loras }
    }

    /// The same matrix for one more reader: values and scales are shared, not copied, and neither bias nor adapters come with
    /// them.
    #[must_use]
    pub fn shared(&self) -> Self {
        let (values, scales) = (self.values.shallow_clone(), self.scales.as_ref().map(Tensor::shallow_clone));
        Self::of(self.width, [self.out_features, self.in_features], values, scales, false)
    }

    /// The same with a bias `[out]`; where `adapted`, it acts on the rows that the model's own adapters act on.
    ///
    /// # Errors
    /// A bias of another shape.
    pub fn with_bias(self, bias: &Tensor, adapted: bool) -> Result<Self> {
        ensure!(bias.size() == [self.out_features], "a bias {:?} for {} outputs", bias.size(), self.out_features);
        let bias = bias.detach().to_kind(Kind::Float).contiguous();
        Ok(Self { bias: Some(bias), bias_is_adapted: adapted, ..self })
    }

    /// The same with `A` `[r, in]` and `B` `[out, r]` more for the adapter `id`, which are kept in f32 beside f32 and else in bf16.
    ///
    /// # Errors
    /// Matrices of other shapes, and an `id` that is none.
    pub fn with_adapter(mut self, id: LoraId, a: &Tensor, b: &Tensor, scaling: f64) -> Result<Self> {
        let r = a.size().first().copied().unwrap_or(0);
        ensure!(
            a.size() == [r, self.in_features] && b.size() == [self.out_features, r] && r > 0,
            "an adapter of {:?} and {:?} for a weight [{}, {}]",
            a.size(),
            b.size(),
            self.out_features,
            self.in_features
        );
        let place = id.place().context("an adapter that is none")?;
        let kind = if self.width == Width::F32 { Kind::Float } else { Kind::BFloat16 };
        let kept = |t: Tensor| t.detach().to_kind(kind);
        let (a, b) = (kept(a.shallow_clone()), kept(b.to_kind(Kind::Float) * scaling));
        if self.loras.len() <= place {
            self.loras.resize_with(place + 1, || None);
        }
        let lora = &mut self.loras[place];
        *lora = Some(match lora {
            None => [a.contiguous(), b.contiguous()],
            Some([before_a, before_b]) => [Tensor::cat(&[before_a, &a], 0), Tensor::cat(&[before_b, &b], 1)],
        });
        let raw = |lora: &Option<[Tensor; 2]>| match lora {
            None => raw::Lora { a: raw::Matrix::NONE, b: raw::Matrix::NONE },
            Some([a, b]) => raw::Lora { a: plain_matrix(a), b: plain_matrix(b) },
        };
        self.raw_loras = RawLoras(self.loras.iter().map(raw).collect());
        Ok(self)
    }

    /// How its numbers are kept.
    pub fn width(&self) -> Width {
        self.width
    }

    /// The last dimension of what goes in.
    pub fn in_features(&self) -> i64 {
        self.in_features
    }

    /// The last dimension of what comes out.
    pub fn out_features(&self) -> i64 {
        self.out_features
    }

    /// Whether it has adapters.
    pub fn has_adapters(&self) -> bool {
        self.loras.iter().any(Option::is_some)
    }

    /// Bytes that it reads for a token, adapters left out: those of values and scales.
    pub fn num_bytes(&self) -> usize {
        let of = |t: &Tensor| t.numel() * t.kind().elt_size_in_bytes();
        of(&self.values) + self.scales.as_ref().map_or(0, of)
    }

    /// Those of them that are its own, not the weight's that it was made of.
    pub fn num_copied_bytes(&self) -> usize {
        if self.is_copy { self.num_bytes() } else { 0 }
    }

    /// Values and scales of a quantised weight, for saving: see [`PackedLinear::from_parts`]. Within the 16 bytes of a group
    /// of 4-bit numbers byte `i` has number `i` in its low half and number `i + 16` in its high one, both plus 8.
    ///
    /// # Errors
    /// Where the weight is not quantised.
    pub fn parts(&self) -> Result<[Tensor; 2]> {
        ensure!(self.width.is_quantised(), "a weight in {} has no quantised parts", self.width);
        // SAFETY: a matrix that points into tensors of `self`, and two places for the results.
        two_of(|a, b| unsafe { ffi::vora_unpack(&self.matrix(), a, b) })
    }

    /// Rows of the weight, `[rows, in]`, in f32 or bf16: for products that are better made by libtorch.
    ///
    /// # Errors
    /// A range beyond the weight, another dtype.
    pub fn dequantise(&self, rows: Range<i64>, kind: Kind) -> Result<Tensor> {
        ensure!(
            0 <= rows.start && rows.start <= rows.end && rows.end <= self.out_features,
            "rows {rows:?} of a weight of {}",
            self.out_features
        );
        if self.width.is_quantised() {
            return self.rows(&rows.collect::<Vec<_>>(), kind);
        }
        Ok(self.values.narrow(0, rows.start, rows.end - rows.start).to_kind(kind))
    }

    /// Rows of the weight in any order, `[n, in]`, in f32 or bf16: what an embedding that is the head asks for.
    ///
    /// # Errors
    /// A row that there is not, another dtype.
    pub fn rows(&self, rows: &[i64], kind: Kind) -> Result<Tensor> {
        if let Some(row) = rows.iter().find(|&&row| row < 0 || row >= self.out_features) {
            bail!("row {row} of a weight of {}", self.out_features);
        }
        ensure!(matches!(kind, Kind::Float | Kind::BFloat16), "rows in {kind:?}: f32 or bf16 was expected");
        if self.width.is_quantised() {
            let matrix = self.matrix();
            let made = |is_bf16| {
                // SAFETY: a matrix that points into tensors of `self`, and rows that it has.
                unsafe { ffi::vora_dequantise(&matrix, rows.as_ptr(), rows.len() as i64, is_bf16) }
            };
            return ffi::tensor(made(i32::from(kind == Kind::BFloat16)));
        }
        Ok(self.values.index_select(0, &Tensor::from_slice(rows)).to_kind(kind))
    }

    /// Without adapters: `[.., in]` -> `[.., out]`, in the dtype of `x`
    ///
    /// # Errors
    /// An `x` of another size or on another device.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_on(x, &[])
    }

    /// As [`PackedLinear::forward`], with an adapter for each of the rows of `x`, flattened; what has none gets what it would
    /// without adapters, bit for bit. Where `adapters` is empty, no row has one.
    ///
    /// # Errors
    /// As [`PackedLinear::forward`], and `adapters` for another number of rows.
    pub fn forward_on(&self, x: &Tensor, adapters: &[LoraId]) -> Result<Tensor> {
        let mut size = x.size();
        ensure!(
            size.last() == Some(&self.in_features),
            "x is {size:?}, its last dimension should be {}",
            self.in_features
        );
        let x32 = x.detach().to_kind(Kind::Float).reshape([-1, self.in_features]).contiguous(); // [rows, in]
        let plain_bias = self.bias.as_ref().filter(|_| !self.bias_is_adapted);
        let mut y = product(&self.matrix(), plain_bias, &x32)?;
        let rows = y.size()[0];
        ensure!(adapters.is_empty() || adapters.len() as i64 == rows, "{rows} rows, adapters of {}", adapters.len());
        if let Some(bias) = self.bias.as_ref().filter(|_| self.bias_is_adapted) {
            let on: Vec<bool> = adapters.iter().map(|&id| id == LoraId::OWN).collect();
            if on.contains(&true) {
                y = (&y + bias).where_self(&Tensor::from_slice(&on).unsqueeze(1), &y);
            }
        }
        for (place, lora) in self.loras.iter().enumerate() {
            let with_it = (0..).zip(adapters).filter(|(_, id)| id.place() == Some(place)).map(|(row, _)| row);
            let with_it: Vec<i64> = with_it.collect();
            if let (Some([a, b]), false) = (lora, with_it.is_empty()) {
                let with_it = Tensor::from_slice(&with_it);
                let low = product(&plain_matrix(a), None, &x32.index_select(0, &with_it))?;
                let _ = y.index_add_(0, &with_it, &product(&plain_matrix(b), None, &low)?);
            }
        }
        if let Some(last) = size.last_mut() {
            *last = self.out_features;
        }
        Ok(y.to_kind(x.kind()).reshape(size))
    }

    fn matrix(&self) -> raw::Matrix {
        raw::Matrix {
            width: self.width.code(),
            out_features: self.out_features,
            in_features: self.in_features,
            values: self.values.data_ptr(),
            scales: self.scales.as_ref().map_or(ptr::null(), |scales| scales.data_ptr() as *const u16),
        }
    }

    /// What `csrc/` takes, which points into tensors of `self`.
    pub(crate) fn raw(&self) -> raw::Linear {
        raw::Linear {
            base: self.matrix(),
            bias: self.bias.as_ref().map_or(ptr::null(), |bias| bias.data_ptr() as *const f32),
            bias_is_adapted: i64::from(self.bias_is_adapted),
            loras: self.raw_loras.0.as_ptr(),
            num_loras: self.raw_loras.0.len() as i64,
        }
    }
}

/// Rows that are quantised together, whole sides of the kernels' order; what they were read into is given back behind them.
const ROWS: i64 = 4096;

/// A weight `[out, in]` -> values and scales in the order that the kernels read.
fn quantise(weight: &Tensor, width: Width) -> Result<[Tensor; 2]> {
    let (rows, columns) = weight.size2()?;
    // SAFETY: two places for the results.
    let [values, scales] = two_of(|a, b| unsafe { ffi::vora_packed_zeros(width.code(), rows, columns, a, b) })?;
    for first in (0..rows).step_by(ROWS as usize) {
        let some = weight.narrow(0, first, ROWS.min(rows - first));
        // SAFETY: three live tensors, the last two for as many rows.
        let status =
            unsafe { ffi::vora_quantise(some.as_ptr(), width.code(), first, values.as_ptr(), scales.as_ptr()) };
        ensure!(status != 1, "a weight has numbers that are not finite, or beyond what the scales of {width} can have");
        ffi::check(status)?;
        forget_view(&some);
    }
    Ok([values, scales])
}

/// A contiguous matrix in f32 or bf16, where it lies.
fn plain_matrix(t: &Tensor) -> raw::Matrix {
    let width = if t.kind() == Kind::Float { Width::F32 } else { Width::Bf16 };
    let size = t.size();
    raw::Matrix {
        width: width.code(),
        out_features: size[0],
        in_features: size[1],
        values: t.data_ptr() as *const c_void,
        scales: ptr::null(),
    }
}

/// `[rows, in]` in f32 -> `[rows, out]` in f32
fn product(matrix: &raw::Matrix, bias: Option<&Tensor>, x: &Tensor) -> Result<Tensor> {
    let bias = bias.map_or(ptr::null(), |bias| bias.data_ptr() as *const f32);
    // SAFETY: a matrix and a bias that point into live tensors, and a live tensor.
    ffi::tensor(unsafe { ffi::vora_linear(matrix, bias, x.as_ptr()) })
}

/// The two tensors that a call makes.
fn two_of(call: impl FnOnce(*mut *mut C_tensor, *mut *mut C_tensor) -> i32) -> Result<[Tensor; 2]> {
    let (mut first, mut second) = (ptr::null_mut(), ptr::null_mut());
    ffi::check(call(&mut first, &mut second))?;
    Ok([ffi::tensor(first)?, ffi::tensor(second)?])
}
