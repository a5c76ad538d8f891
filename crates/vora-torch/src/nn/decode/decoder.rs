//! `Decoder`: all layers and the head, and a step through them.

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use super::layer::{Layer, pointer, read};
use super::pages::Pages;
use super::shape::DecoderShape;
use super::step::Step;
use crate::ffi::{self, decode as raw};
use crate::packed::PackedLinear;

/// Layers, final norm and head: `x [rows, hidden]` -> `[rows, vocab]`.
///
/// Memory for what lies between is taken once and grows with the largest step.
#[derive(Debug)]
pub struct Decoder {
    shape: DecoderShape,
    layers: Vec<Layer>,
    raw: RawLayers,
    final_norm: Tensor,
    head: PackedLinear,
    memory: Vec<u8>,
}

/// What `csrc/` takes of the layers, made once.
#[derive(Debug)]
struct RawLayers(Vec<raw::Layer>);

// SAFETY: it points into tensors of the layers that lie beside it, which are `Send`, and is read in `step` alone.
unsafe impl Send for RawLayers {}

impl Decoder {
    /// Puts the parts together; `head` is `[vocab, hidden]`, of any width.
    ///
    /// # Errors
    /// Parts that do not fit the shape.
    pub fn new(shape: DecoderShape, layers: Vec<Layer>, final_norm: &Tensor, head: PackedLinear) -> Result<Self> {
        let DecoderShape { hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, .. } = shape;
        ensure!(
            hidden_size > 0
                && intermediate_size > 0
                && num_kv_heads > 0
                && num_heads > 0
                && num_heads % num_kv_heads == 0
                && head_dim > 0
                && head_dim % 2 == 0,
            "a decoder of {shape:?}"
        );
        ensure!(head.in_features() == hidden_size, "a head of {} inputs for {hidden_size}", head.in_features());
        let layers: Vec<Layer> = layers.into_iter().map(|layer| layer.checked(&shape)).collect::<Result<_>>()?;
        let raw = RawLayers(layers.iter().map(Layer::raw).collect());
        let final_norm = read(final_norm, &[hidden_size])?;
        Ok(Self { shape, layers, raw, final_norm, head, memory: Vec::new() })
    }

    /// Sizes and constants.
    pub fn shape(&self) -> &DecoderShape {
        &self.shape
    }

    /// The layers, first to last.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The head.
    pub fn head(&self) -> &PackedLinear {
        &self.head
    }

    /// Bytes that a step reads of weights, adapters left out.
    pub fn num_bytes(&self) -> usize {
        self.linears().map(PackedLinear::num_bytes).sum()
    }

    /// Those of them that are its own, not of the weights that it was made of.
    pub fn num_copied_bytes(&self) -> usize {
        self.linears().map(PackedLinear::num_copied_bytes).sum()
    }

    fn linears(&self) -> impl Iterator<Item = &PackedLinear> {
        self.layers.iter().flat_map(Layer::linears).chain([&self.head])
    }

    /// New tokens: `x` `[rows, hidden]` -> logits of the rows that are asked for, `[asked, vocab]`, in f32. Keys and values of
    /// the new tokens are written into `pages`.
    ///
    /// # Errors
    /// A step that does not fit the pages, or an `x` that does not fit it: nothing is written then.
    pub fn step(&mut self, x: &Tensor, pages: &Pages, step: &Step) -> Result<Tensor> {
        let (shape, rows) = (&self.shape, step.rows() as i64);
        ensure!(
            pages.num_layers() == self.layers.len() && pages.head() == [shape.num_kv_heads, shape.head_dim],
            "pages of {} layers with heads {:?} for {} layers with heads {:?}",
            pages.num_layers(),
            pages.head(),
            self.layers.len(),
            [shape.num_kv_heads, shape.head_dim]
        );
        step.check(pages, shape.head_dim)?;
        ensure!(
            x.size() == [rows, shape.hidden_size] && x.device() == Device::Cpu,
            "x is {:?}, [{rows}, {}] was expected",
            x.size(),
            shape.hidden_size
        );
        let x = x.detach().to_kind(Kind::Float).contiguous();
        let all: Vec<i64>;
        let asked = if step.asked.is_empty() {
            all = (0..rows).collect();
            &all
        } else {
            step.asked
        };
        let own_ends: Vec<i64>;
        let ends = if step.ends.is_empty() {
            own_ends = step.lens.iter().map(|len| len + 1).collect();
            &own_ends
        } else {
            step.ends
        };
        let logits = Tensor::empty([asked.len() as i64, self.head.out_features()], (Kind::Float, Device::Cpu));
        let [keys, values] = pages.addresses();
        let decoder = raw::Decoder {
            hidden: shape.hidden_size,
            intermediate: shape.intermediate_size,
            heads: shape.num_heads,
            kv_heads: shape.num_kv_heads,
            head_dim: shape.head_dim,
            norms_after: i64::from(shape.norms_after),
            eps: shape.rms_norm_eps,
            head_eps: shape.head_norm_eps,
            scale: shape.scale,
            layers: self.raw.0.as_ptr(),
            num_layers: self.layers.len() as i64,
            final_norm: pointer(&self.final_norm),
            head: self.head.raw(),
        };
        let step = raw::Step {
            rows,
            threads: i64::from(tch::get_num_threads()).max(1),
            page_len: pages.page_len(),
            max_pages: step.tables.len() as i64 / rows,
            pages_are_bf16: i64::from(pages.kind() == Kind::BFloat16),
            tables: step.tables.as_ptr(),
            lens: step.lens.as_ptr(),
            ends: ends.as_ptr(),
            cos: step.cos.as_ptr(),
            sin: step.sin.as_ptr(),
            adapters: step.adapters.as_ptr().cast(), // a byte each
            keys,
            values,
            x: x.data_ptr() as *const f32,
            asked: asked.as_ptr(),
            num_asked: asked.len() as i64,
            logits: logits.data_ptr() as *mut f32,
        };
        // SAFETY: both point into tensors and slices that live until the calls return, and `check` has seen that tables and
        // lengths stay within the pages; the memory is as long as the first call says.
        unsafe {
            let needed = ffi::vora_decode_memory(&decoder, &step) as usize;
            if self.memory.len() < needed {
                self.memory = vec![0; needed];
            }
            ffi::check(ffi::vora_decode_step(&decoder, &step, self.memory.as_mut_ptr()))?;
        }
        Ok(logits)
    }
}
