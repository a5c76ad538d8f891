//! `PackedDecoder`: a decoder on the CPU for some tokens in one call, with weights in a width of its own.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use tch::{Device, Kind, Tensor};
use vora_lora::Linear;
use vora_torch::nn::decode::{self, DecoderShape, HeadNorm, LoraId, PackedLinear, Pages, Step, Width};
use vora_torch::weights::{Quantization, QuantizedWeight};

use super::causal_lm::{CausalLm, plain_width};
use super::layer::DecoderLayer;
use crate::architecture::QkNorm;
use crate::config::LlmConfig;
use crate::rotary::Rotary;

/// Added to the variance by the layer norm of heads, whatever the config says: see [`HeadNorm`](crate::HeadNorm).
const LAYER_NORM_EPS: f64 = 1e-5;

/// A [`CausalLm`]'s decoding steps: embedding, layers, final norm and head, over keys and values in [`Pages`].
///
/// It has its adapters, unmerged, as they were when it was made, and shares those weights that have the width already:
/// [`CausalLm::width`] says which that is. Hidden
/// states are f32: a bf16 model's logits are closer to those of f32 than libtorch's, which rounds them after every operator.
/// A row's logits are the same, bit for bit, whatever other rows a step has, so also however a prompt is cut into steps. Where
/// rotary frequencies depend on the length (dynamic NTK, LongRoPE) it is that of the row's own text.
#[derive(Debug)]
pub struct PackedDecoder {
    decoder: decode::Decoder,
    rotary: Rotary,
    embed_tokens: Tensor, // [vocab, hidden]
    width: Width,
    kind: Kind, // of the model
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// Where new tokens stand, one a row. Several rows may be tokens of one text, which then have the same pages: a prompt, or a
/// part of it.
#[derive(Debug, Clone, Copy, Default)]
pub struct PackedStep<'a> {
    /// The pages of each row, `[rows, max_pages]`; what lies beyond a row's tokens may be anything.
    pub tables: &'a [i32],
    /// Tokens before the new one, `[rows]`: it is written to the slot behind them.
    pub lens: &'a [i64],
    /// How many tokens of its text each row attends to, `[rows]`, all of which are held or written in this step: the end of a
    /// picture whose tokens attend to each other. Where this is empty, those before it and itself.
    pub ends: &'a [i64],
    /// The new token's position, `[rows]`.
    pub position_ids: &'a [i64],
    /// Tokens that each row's text will have after this step, `[rows]`, by which rotary frequencies go where they depend on the
    /// length; where this is empty, a text ends with its row's position.
    pub seq_lens: &'a [i64],
    /// The adapter of each row, `[rows]`: fastest where rows of one lie side by side.
    pub adapters: &'a [LoraId],
    /// The rows whose logits are asked for; all where this is empty.
    pub asked: &'a [i64],
}

impl PackedDecoder {
    /// Packs a model with each matrix in the width that it has already: those in groups of few bits as they are, the others in the
    /// model's dtype. None where [`PackedDecoder::new`] gives none, or the bits are others ([`CausalLm::width`]).
    ///
    /// The head of a model in few bits is kept in [`Width::Int8`], but for that of a file whose own blocks are kept
    /// ([`Weights::keeping_blocks`](crate::Weights::keeping_blocks)), which is as it is there.
    ///
    /// # Errors
    /// Where a weight cannot be packed.
    pub fn as_stored(llm: &CausalLm) -> Result<Option<Self>> {
        let Some(own) = llm.width() else { return Ok(None) };
        let of_linear = |linear: &Linear| {
            let quantization = linear.quantized().map(QuantizedWeight::quantization);
            quantization.and_then(Quantization::width).unwrap_or(plain_width(llm.kind()))
        };
        Self::pack(llm, own, &of_linear, || match llm.stored_head() {
            Some(head) => Ok(head.shared()),
            None => PackedLinear::new(llm.head(), head_width(own)),
        })
    }

    /// Packs a model in one width: none where its device, or one of its adapters, is not served, or processes share its weights, and
    /// [`CausalLm::decode_step`] is to go on. Served are all architectures but Gemma's on the CPU, and adapters without a magnitude. A head
    /// in [`Width::Int4`] is kept in [`Width::Int8`]: a token's logits are more sensitive than what layers do in between.
    ///
    /// # Errors
    /// Where a weight cannot be packed.
    pub fn new(llm: &CausalLm, width: Width) -> Result<Option<Self>> {
        Self::pack(llm, width, &|_| width, || PackedLinear::new(llm.head(), head_width(width)))
    }

    fn pack(
        llm: &CausalLm,
        width: Width,
        of_linear: &dyn Fn(&Linear) -> Width,
        head: impl FnOnce() -> Result<PackedLinear>,
    ) -> Result<Option<Self>> {
        let is_dora = llm
            .model
            .layers
            .iter()
            .flat_map(DecoderLayer::linears)
            .any(|(_, linear)| linear.adapters().any(|adapter| adapter.magnitude().is_some())); // none by name is one
        let config = llm.config();
        let is_shared = llm.model.shards().is_some();
        if llm.device() != Device::Cpu || is_dora || is_shared || !config.architecture().packs {
            return Ok(None);
        }
        let layers = llm.model.layers.iter().enumerate();
        let layers = layers.map(|(layer_idx, layer)| {
            pack_layer(config, layer_idx, layer, of_linear).with_context(|| format!("packing model.layers.{layer_idx}"))
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let embed_tokens = llm.model.embed_tokens.detach();
        let head = head().context("packing the head")?;
        let shape = DecoderShape {
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            num_heads: config.num_attention_heads,
            num_kv_heads: config.kv_heads(),
            head_dim: config.head_width(),
            rms_norm_eps: config.rms_norm_eps,
            head_norm_eps: match config.head_norm() {
                Some(QkNorm::Layer) => LAYER_NORM_EPS,
                Some(QkNorm::Rms) | None => config.rms_norm_eps,
            },
            scale: 1.0 / (config.head_width() as f64).sqrt(),
            norms_after: config.has_swin_norm(),
        };
        Ok(Some(Self {
            decoder: decode::Decoder::new(shape, layers, llm.model.norm.weight(), head)?,
            rotary: Rotary::new(config)?,
            embed_tokens,
            width,
            kind: llm.kind(),
            cos: Vec::new(),
            sin: Vec::new(),
        }))
    }

    /// The width of its layers, or of most where they differ.
    pub fn width(&self) -> Width {
        self.width
    }

    /// Layers and head: a product with many rows may go through its matrices, too.
    pub fn decoder(&self) -> &decode::Decoder {
        &self.decoder
    }

    /// Bytes that its weights take beside the model's.
    pub fn num_bytes(&self) -> usize {
        self.decoder.num_copied_bytes()
    }

    /// A token for every row, `[rows]` -> logits `[asked, vocab]` in f32. Its keys and values are written into `pages`.
    ///
    /// # Errors
    /// A token that there is not; a step that does not fit the pages.
    pub fn decode_step(&mut self, input_ids: &[i64], pages: &Pages, step: &PackedStep) -> Result<Tensor> {
        let vocab = self.embed_tokens.size()[0];
        if let Some(id) = input_ids.iter().find(|&&id| id < 0 || id >= vocab) {
            bail!("token {id} of a vocabulary of {vocab}");
        }
        let embeds = tch::no_grad(|| self.embed_tokens.index_select(0, &Tensor::from_slice(input_ids)));
        self.forward(&embeds, pages, step)
    }

    /// The same with embeddings of tokens and pictures, `[rows, hidden]`
    ///
    /// # Errors
    /// As [`PackedDecoder::decode_step`].
    pub fn forward(&mut self, inputs_embeds: &Tensor, pages: &Pages, step: &PackedStep) -> Result<Tensor> {
        let (rows, positions, seq_lens) = (step.lens.len(), step.position_ids, step.seq_lens);
        ensure!(
            positions.len() == rows && (seq_lens.is_empty() || seq_lens.len() == rows),
            "a step of {rows} rows with {} positions in texts of {} lengths",
            positions.len(),
            seq_lens.len()
        );
        self.cos.clear();
        self.sin.clear();
        for (row, &position_id) in positions.iter().enumerate() {
            let seq_len = seq_lens.get(row).map_or(position_id + 1, |&len| len);
            self.rotary.push_angles(position_id, seq_len, &mut self.cos, &mut self.sin);
        }
        let step = Step {
            tables: step.tables,
            lens: step.lens,
            ends: step.ends,
            cos: &self.cos,
            sin: &self.sin,
            adapters: step.adapters,
            asked: step.asked,
        };
        tch::no_grad(|| self.decoder.step(&inputs_embeds.to_kind(self.kind), pages, &step))
    }
}

/// The width of a head over layers of this one.
fn head_width(width: Width) -> Width {
    if width == Width::Int4 { Width::Int8 } else { width }
}

fn pack_layer(
    config: &LlmConfig,
    layer_idx: usize,
    layer: &DecoderLayer,
    of_linear: &dyn Fn(&Linear) -> Width,
) -> Result<decode::Layer> {
    let mut linears = layer.linears().into_iter();
    let mut next = || {
        let (name, linear) = linears.next().context("seven linear layers")?;
        pack_linear(linear, of_linear(linear)).context(name)
    };
    let norms: BTreeMap<String, &Tensor> = layer.other_tensors().into_iter().collect();
    let norm = |name: &str| norms.get(name).map(|t| t.shallow_clone());
    let head_norm = |name: &str| -> Option<HeadNorm> {
        let weight = norm(&format!("self_attn.{name}.weight"))?;
        Some(match norm(&format!("self_attn.{name}.bias")) {
            Some(bias) => HeadNorm::Layer { weight, bias },
            None => HeadNorm::Rms(weight),
        })
    };
    Ok(decode::Layer {
        q_proj: next()?,
        k_proj: next()?,
        v_proj: next()?,
        o_proj: next()?,
        gate_proj: next()?,
        up_proj: next()?,
        down_proj: next()?,
        input_layernorm: norm("input_layernorm.weight").context("input_layernorm")?,
        post_attention_layernorm: norm("post_attention_layernorm.weight").context("post_attention_layernorm")?,
        q_norm: head_norm("q_norm"),
        k_norm: head_norm("k_norm"),
        rotates: config.has_rope(layer_idx),
        window: config.window(layer_idx),
    })
}

fn pack_linear(linear: &Linear, width: Width) -> Result<PackedLinear> {
    let kept = linear.quantized().and_then(QuantizedWeight::packed).filter(|packed| packed.width() == width);
    let mut packed = match kept {
        Some(packed) => packed.shared(),
        None => PackedLinear::new(&linear.weight(), width)?,
    };
    if let Some(bias) = linear.bias() {
        packed = packed.with_bias(bias, linear.bias_is_adapted())?;
    }
    let own = linear.adapters().map(|adapter| (LoraId::OWN, adapter));
    for (id, adapter) in own.chain(linear.named_adapters()) {
        packed = packed.with_adapter(id, adapter.lora_a(), adapter.lora_b(), adapter.scaling())?;
    }
    Ok(packed)
}
