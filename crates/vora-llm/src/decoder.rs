//! The decoder: layers of attention and MLP around a residual stream, and the head that turns it into logits.

mod dropout;
mod recompute;

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor, nn::Module};
use vora_files::tell_once;
use vora_lora::Linear;
use vora_torch::nn::RmsNorm;
use vora_torch::weights::{Init, Weights};

use crate::attention::Attention;
use crate::attention::AttentionPlan;
use crate::config::LlmConfig;
use crate::head_norm::HeadNorm;
use crate::kv_cache::KvCache;
use crate::mlp::Mlp;
use crate::rotary::{CosSin, Rotary};

pub use dropout::DropoutSeed;
pub use recompute::Recompute;

/// `h = x + self_attn(input_layernorm(x))`, then `h + mlp(post_attention_layernorm(h))`; with `swin_norm`, each norm
/// behind its block: `h = x + input_layernorm(self_attn(x))`, then `h + post_attention_layernorm(mlp(h))`.
#[derive(Debug)]
pub struct DecoderLayer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
    swin_norm: bool,
    slides: bool, // whether it has the decoder's window
    dropout: f64, // of what attention and MLP add, in training
}

impl DecoderLayer {
    /// Takes one `model.layers.N`.
    pub fn load(config: &LlmConfig, layer_idx: usize, weights: &Weights) -> Result<Self> {
        let norm = |name: &str| RmsNorm::load(&weights.pp(name), config.hidden_size, config.rms_norm_eps);
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            self_attn: Attention::load(config, layer_idx, &weights.pp("self_attn"))?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: Mlp::load(config, &weights.pp("mlp"))?,
            swin_norm: config.has_swin_norm(),
            slides: config.window(layer_idx).is_some(),
            dropout: config.dropout.unwrap_or(0.0),
        })
    }

    /// `[batch, seq, hidden]` -> `[batch, seq, hidden]`; a layer with a sliding window takes a plan within it.
    pub fn forward(&self, x: &Tensor, cos_sin: &CosSin, plan: &AttentionPlan) -> Tensor {
        self.around(x, 0.0, |x| self.self_attn.forward(x, cos_sin, plan))
    }

    /// As [`DecoderLayer::forward`], without what dropout takes, which `seed` decides.
    pub fn forward_train(&self, x: &Tensor, cos_sin: &CosSin, plan: &AttentionPlan, seed: DropoutSeed) -> Tensor {
        if self.dropout > 0.0 || self.self_attn.drops() {
            seed.begin();
        }
        self.around(x, self.dropout, |x| self.self_attn.forward_train(x, cos_sin, plan))
    }

    /// What attention puts into its softmax, from what goes into the layer.
    fn attention_logits(&self, x: &Tensor, cos_sin: &CosSin) -> Tensor {
        if self.swin_norm {
            return self.self_attn.logits(x, cos_sin);
        }
        self.self_attn.logits(&self.input_layernorm.forward(x), cos_sin)
    }

    /// The residual stream around whichever form of attention.
    fn around(&self, x: &Tensor, dropout: f64, attention: impl FnOnce(&Tensor) -> Tensor) -> Tensor {
        let drop = |x: Tensor| if dropout > 0.0 { x.dropout(dropout, true) } else { x };
        if self.swin_norm {
            let h = x + self.input_layernorm.forward(&drop(attention(x))); // [batch, seq, hidden]
            let mlp = self.post_attention_layernorm.forward(&drop(self.mlp.forward(&h)));
            return h + mlp;
        }
        let h = x + drop(attention(&self.input_layernorm.forward(x))); // [batch, seq, hidden]
        let mlp = drop(self.mlp.forward(&self.post_attention_layernorm.forward(&h)));
        h + mlp
    }

    /// The linear layers by their names on disk, in the order of HF's `named_modules`.
    fn linears(&self) -> [(&'static str, &Linear); 7] {
        let (a, m) = (&self.self_attn, &self.mlp);
        [
            ("self_attn.q_proj", &a.q_proj),
            ("self_attn.k_proj", &a.k_proj),
            ("self_attn.v_proj", &a.v_proj),
            ("self_attn.o_proj", &a.o_proj),
            ("mlp.gate_proj", &m.gate_proj),
            ("mlp.up_proj", &m.up_proj),
            ("mlp.down_proj", &m.down_proj),
        ]
    }

    fn linears_mut(&mut self) -> [(&'static str, &mut Linear); 7] {
        let (a, m) = (&mut self.self_attn, &mut self.mlp);
        [
            ("self_attn.q_proj", &mut a.q_proj),
            ("self_attn.k_proj", &mut a.k_proj),
            ("self_attn.v_proj", &mut a.v_proj),
            ("self_attn.o_proj", &mut a.o_proj),
            ("mlp.gate_proj", &mut m.gate_proj),
            ("mlp.up_proj", &mut m.up_proj),
            ("mlp.down_proj", &mut m.down_proj),
        ]
    }

    /// The tensors of all norms by their names on disk.
    fn norm_tensors(&self) -> Vec<(String, &Tensor)> {
        let mut tensors = vec![
            ("input_layernorm.weight".to_owned(), self.input_layernorm.weight()),
            ("post_attention_layernorm.weight".to_owned(), self.post_attention_layernorm.weight()),
        ];
        for (name, norm) in [("q_norm", &self.self_attn.q_norm), ("k_norm", &self.self_attn.k_norm)] {
            for (tensor_name, tensor) in norm.iter().flat_map(HeadNorm::tensors) {
                tensors.push((format!("self_attn.{name}.{tensor_name}"), tensor));
            }
        }
        tensors
    }
}

/// What layers share, and what those with a sliding window share instead where the window hides something.
struct Shared<'a, T> {
    full: &'a T,
    windowed: Option<T>,
}

impl<T> Shared<'_, T> {
    fn by(&self, layer: &DecoderLayer) -> &T {
        self.windowed.as_ref().filter(|_| layer.slides).unwrap_or(self.full)
    }
}

/// What a forward leaves.
#[derive(Debug)]
pub struct Output {
    /// After the final norm, `[batch, seq, hidden]`.
    pub last_hidden_state: Tensor,
    /// What goes into that norm, `[batch, seq, hidden]`.
    pub before_norm: Tensor,
    /// The embeddings, then the output of each layer asked for, `[batch, seq, hidden]` each; as in HF, the one after
    /// the last layer of all is the normed one.
    pub hidden_states: Vec<Tensor>,
}

/// Embedding, layers and final norm: everything under `model.` in a checkpoint.
#[derive(Debug)]
pub struct Decoder {
    embed_tokens: Tensor, // [vocab, hidden]
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    rotary: Rotary,
    window: Option<i64>, // of the layers that have one
}

impl Decoder {
    /// Takes `embed_tokens`, `layers` and `norm`.
    pub fn load(config: &LlmConfig, weights: &Weights) -> Result<Self> {
        let vocab = [config.vocab_size, config.hidden_size];
        let embed_tokens = weights.pp("embed_tokens").get("weight", &vocab, Init::Required)?;
        let layers = (0..config.num_hidden_layers)
            .map(|layer_idx| {
                let weights = weights.pp("layers").pp(layer_idx);
                // Old Llama checkpoints hold the rotary frequencies of every layer; they follow from the config.
                weights.ignore("self_attn.rotary_emb.inv_freq");
                DecoderLayer::load(config, layer_idx, &weights)
            })
            .collect::<Result<_>>()?;
        let norm = RmsNorm::load(&weights.pp("norm"), config.hidden_size, config.rms_norm_eps)?;
        let window = (0..config.num_hidden_layers).find_map(|layer_idx| config.window(layer_idx));
        Ok(Self { embed_tokens, layers, norm, rotary: Rotary::new(config)?, window })
    }

    /// `[batch, seq, hidden]` -> [`Output`] with `hidden_states[0..=hidden_layers]`
    pub fn forward(&self, inputs_embeds: &Tensor, plan: &AttentionPlan, hidden_layers: usize) -> Output {
        self.through(inputs_embeds, plan, hidden_layers, |_, layer, x, cos_sin, plan| layer.forward(x, cos_sin, plan))
    }

    /// As [`Decoder::forward`], with dropout.
    pub fn forward_train(
        &self,
        inputs_embeds: &Tensor,
        plan: &AttentionPlan,
        hidden_layers: usize,
        seed: DropoutSeed,
    ) -> Output {
        self.through(inputs_embeds, plan, hidden_layers, |layer_idx, layer, x, cos_sin, plan| {
            layer.forward_train(x, cos_sin, plan, seed.at(layer_idx as u64))
        })
    }

    /// Through all layers, by either of their forwards.
    fn through(
        &self,
        inputs_embeds: &Tensor,
        plan: &AttentionPlan,
        hidden_layers: usize,
        forward: impl Fn(usize, &DecoderLayer, &Tensor, &CosSin, &AttentionPlan) -> Tensor,
    ) -> Output {
        let cos_sin = self.rotary.cos_sin(plan.position_ids(), plan.num_positions());
        let plans = self.plans(plan);
        let mut hidden_states = vec![inputs_embeds.shallow_clone()];
        let mut x = inputs_embeds.shallow_clone(); // [batch, seq, hidden]
        for (layer_idx, layer) in self.layers.iter().enumerate() {
            x = forward(layer_idx, layer, &x, &cos_sin, plans.by(layer));
            if layer_idx < hidden_layers.min(self.layers.len() - 1) {
                hidden_states.push(x.shallow_clone());
            }
        }
        let last_hidden_state = self.norm.forward(&x);
        if hidden_layers >= self.layers.len() {
            hidden_states.push(last_hidden_state.shallow_clone());
        }
        Output { last_hidden_state, before_norm: x, hidden_states }
    }

    /// The plan of a batch, for all layers at once.
    fn plans<'a>(&self, plan: &'a AttentionPlan) -> Shared<'a, AttentionPlan> {
        Shared { full: plan, windowed: self.window.and_then(|window| plan.within(window)) }
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// The last norm, as a decoder without a head has it in its file.
const BARE_NORM: &str = "norm.weight";

/// A decoder with its head.
#[derive(Debug)]
pub struct CausalLm {
    model: Decoder,
    lm_head: Option<Tensor>, // [vocab, hidden]; none where the embedding is the head
    config: LlmConfig,
    device: Device,
    kind: Kind,
}

impl CausalLm {
    /// Takes `model` and, where it is not tied to the embedding, `lm_head`. Where the config ties them, but the
    /// checkpoint has a head of other values, they are not tied, and [`CausalLm::config`] says so. As in HF, either of
    /// two that are tied stands for both, and names may lack their `model.`: a file saved without the head. Chameleon's
    /// image tokenizer lies under `model.vqmodel` in the same files and is left to others: pass a clone of the source to
    /// them, or allow those names when it finishes.
    ///
    /// With [`Weights::trained`] every weight is trained. A source of new weights starts them as HF's `_init_weights`
    /// does: matrices normal with the config's `initializer_range`, norms one, biases zero. HF differs at the padding
    /// token, whose embedding it starts at zero and does not train: a row like any other here.
    ///
    /// # Errors
    /// What [`LlmConfig::validate`] refuses; tensors that do not fit are told by [`Weights::finish`].
    pub fn load(config: &LlmConfig, weights: &Weights) -> Result<Self> {
        config.validate()?;
        let weights = weights.with_initializer_range(config.init_std());
        let mut config = config.clone();
        if weights.contains(BARE_NORM) && !weights.contains(&format!("model.{BARE_NORM}")) {
            for name in weights.names().iter().filter(|name| !name.starts_with("lm_head.")) {
                weights.alias(&format!("model.{name}"), name);
            }
        }
        if config.tie_word_embeddings && !weights.contains(EMBEDDING) && weights.contains(HEAD) {
            weights.alias(EMBEDDING, HEAD);
        }
        config.tie_word_embeddings = config.tie_word_embeddings && !has_another_head(&weights)?;
        let head = weights.pp("lm_head");
        let lm_head = if config.tie_word_embeddings {
            head.ignore("weight"); // a second copy of the embedding, in some files
            None
        } else {
            Some(head.get("weight", &[config.vocab_size, config.hidden_size], Init::Required)?)
        };
        Ok(Self {
            model: Decoder::load(&config, &weights.pp("model"))?,
            lm_head,
            config,
            device: weights.device(),
            kind: weights.kind(),
        })
    }

    /// Sizes and constants.
    pub fn config(&self) -> &LlmConfig {
        &self.config
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The kind of hidden states, and of weights that are not trained.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// `[..]` -> `[.., hidden]`
    pub fn embed(&self, input_ids: &Tensor) -> Tensor {
        Tensor::embedding(&self.model.embed_tokens, input_ids, -1, false, false).to_kind(self.kind)
    }

    /// `[batch, seq, hidden]` -> [`Output`] with `hidden_states[0..=hidden_layers]`; no logits.
    pub fn forward(&self, inputs_embeds: &Tensor, plan: &AttentionPlan, hidden_layers: usize) -> Output {
        self.model.forward(inputs_embeds, plan, hidden_layers)
    }

    /// As [`CausalLm::forward`], with the config's `attention_dropout` and `dropout`; `seed` decides what is dropped. It
    /// is set in libtorch's generator, the process's one, where the config has either. Beside this and
    /// [`CausalLm::forward_recomputed`] nothing that this type computes drops anything.
    pub fn forward_train(
        &self,
        inputs_embeds: &Tensor,
        plan: &AttentionPlan,
        hidden_layers: usize,
        seed: DropoutSeed,
    ) -> Output {
        self.model.forward_train(inputs_embeds, plan, hidden_layers, seed)
    }

    /// As [`CausalLm::forward_train`], in little memory: what goes into each layer is kept, nothing from inside it. A loss over
    /// the output goes backward by its own `backward`, then by [`Recompute::backward`], at the cost of a second forward.
    pub fn forward_recomputed(
        &self,
        inputs_embeds: &Tensor,
        plan: AttentionPlan,
        hidden_layers: usize,
        seed: DropoutSeed,
    ) -> (Output, Recompute<'_>) {
        self.model.forward_recomputed(inputs_embeds, plan, hidden_layers, seed)
    }

    /// What every layer's attention puts into its softmax, without the mask: from the `hidden_states` of a forward with
    /// that plan, `[batch, heads, seq, seq]` for each layer that they reach. Logits that grow without bound foretell a
    /// training that diverges (arXiv 2309.14322).
    pub fn attention_logits(&self, hidden_states: &[Tensor], plan: &AttentionPlan) -> Vec<Tensor> {
        let cos_sin = self.model.rotary.cos_sin(plan.position_ids(), plan.num_positions());
        self.model.layers.iter().zip(hidden_states).map(|(layer, x)| layer.attention_logits(x, &cos_sin)).collect()
    }

    /// Logits where they are asked for: `[n, hidden]` -> `[n, vocab]`
    ///
    /// For a Chameleon they are as the head gives them: HF's forward puts those of image codes to the lowest number,
    /// which is the business of whoever samples text.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        let head = self.lm_head.as_ref().unwrap_or(&self.model.embed_tokens);
        hidden.linear::<&Tensor>(&head.to_kind(hidden.kind()), None)
    }

    /// Whether the head's own weight is trained, tied to the embedding or not.
    pub fn trains_head(&self) -> bool {
        self.lm_head.as_ref().unwrap_or(&self.model.embed_tokens).requires_grad()
    }

    /// A cache for this model.
    ///
    /// # Errors
    /// See [`KvCache::new`].
    pub fn new_cache(&self, batch: i64, capacity: i64) -> Result<KvCache> {
        KvCache::new(&self.config, batch, capacity, self.device, self.kind)
    }

    /// Fills an empty cache: `[batch, seq, hidden]` -> logits of each row's last token `[batch, vocab]`
    ///
    /// # Errors
    /// Where the batch does not fit into the cache, or has rows that cannot be continued.
    pub fn prefill(&self, inputs_embeds: &Tensor, plan: &AttentionPlan, cache: &mut KvCache) -> Result<Tensor> {
        cache.check_prefill(plan)?;
        Ok(tch::no_grad(|| {
            let cos_sin = self.model.rotary.cos_sin(plan.position_ids(), plan.num_positions());
            let plans = self.model.plans(plan);
            let mut x = inputs_embeds.shallow_clone(); // [batch, seq, hidden]
            for (layer, kept) in self.model.layers.iter().zip(&mut cache.layers) {
                x = layer.around(&x, 0.0, |x| layer.self_attn.prefill(x, &cos_sin, plans.by(layer), kept));
            }
            cache.filled(plan);
            let rows: Vec<Tensor> = (0..).zip(plan.row_lens()).map(|(row, len)| x.get(row).get(len - 1)).collect();
            self.logits(&self.model.norm.forward(&Tensor::stack(&rows, 0)))
        }))
    }

    /// One more token for every row: `[batch, 1]` -> logits `[batch, vocab]`
    ///
    /// # Errors
    /// Where the cache is empty, full, or for another number of rows.
    pub fn decode_step(&self, input_ids: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let (batch, new) = input_ids.size2()?;
        ensure!(new == 1, "{new} tokens a row in one decoding step");
        let step = cache.next_step(batch)?;
        Ok(tch::no_grad(|| {
            let cos_sin = self.model.rotary.cos_sin(&step.position_ids, step.seen);
            let windowed = self.model.window.and_then(|window| step.within(window));
            let steps = Shared { full: &step, windowed };
            let mut x = self.embed(input_ids); // [batch, 1, hidden]
            for (layer, kept) in self.model.layers.iter().zip(&mut cache.layers) {
                x = layer.around(&x, 0.0, |x| layer.self_attn.decode_step(x, &cos_sin, steps.by(layer), kept));
            }
            cache.stepped();
            self.logits(&self.model.norm.forward(&x.squeeze_dim(1)))
        }))
    }

    /// Visits every linear layer: its layer's index, its name within (`self_attn.q_proj`), itself.
    ///
    /// # Errors
    /// The first that `visit` returns.
    pub fn linears_mut(&mut self, visit: &mut dyn FnMut(usize, &str, &mut Linear) -> Result<()>) -> Result<()> {
        for (layer_idx, layer) in self.model.layers.iter_mut().enumerate() {
            for (name, linear) in layer.linears_mut() {
                visit(layer_idx, name, linear)?;
            }
        }
        Ok(())
    }

    /// As [`CausalLm::linears_mut`], without changing them.
    ///
    /// # Errors
    /// The first that `visit` returns.
    pub fn linears(&self, visit: &mut dyn FnMut(usize, &str, &Linear) -> Result<()>) -> Result<()> {
        for (layer_idx, layer) in self.model.layers.iter().enumerate() {
            for (name, linear) in layer.linears() {
                visit(layer_idx, name, linear)?;
            }
        }
        Ok(())
    }

    /// Every tensor of a plain checkpoint, by HF's name, adapters left out: merge them first. Trained ones are the f32
    /// masters themselves.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), self.model.embed_tokens.shallow_clone())];
        for (layer_idx, layer) in self.model.layers.iter().enumerate() {
            let mut push = |name: &str, tensor: &Tensor| {
                tensors.push((format!("model.layers.{layer_idx}.{name}"), tensor.shallow_clone()));
            };
            for (name, linear) in layer.linears() {
                push(&format!("{name}.weight"), linear.weight());
                if let Some(bias) = linear.bias() {
                    push(&format!("{name}.bias"), bias);
                }
            }
            for (name, tensor) in layer.norm_tensors() {
                push(&name, tensor);
            }
        }
        tensors.push(("model.norm.weight".to_owned(), self.model.norm.weight().shallow_clone()));
        if let Some(lm_head) = &self.lm_head {
            tensors.push(("lm_head.weight".to_owned(), lm_head.shallow_clone()));
        }
        tensors
    }
}

/// Whether a checkpoint has both an embedding and a head, which differ in the kind that they are loaded in.
fn has_another_head(weights: &Weights) -> Result<bool> {
    let stored = |name: &str| anyhow::Ok(weights.stored_tensor(name)?.map(|tensor| tensor.to_kind(weights.kind())));
    let (Some(head), Some(embedding)) = (stored(HEAD)?, stored(EMBEDDING)?) else { return Ok(false) };
    let differs = !head.equal(&embedding);
    if differs {
        tell_once(format!(
            "{}: the config ties the head to the embedding, but lm_head.weight holds other values: they are not tied, as \
             in transformers; `tie_word_embeddings: false` in config.json says the same",
            weights.origin().display()
        ));
    }
    Ok(differs)
}

#[cfg(test)]
mod architectures;

#[cfg(test)]
mod training;

#[cfg(test)]
mod tests {
    use super::*;
    use fixtures::Golden;
    use vora_lora::LoraConfig;

    use crate::VisionAttention;
    use vora_text::{Span, Spans};

    const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn plan(rows: Vec<Vec<Span>>, mode: VisionAttention) -> AttentionPlan {
        AttentionPlan::new(&Spans { rows }, mode, Device::Cpu, Kind::Float).unwrap()
    }

    fn text(lens: &[i64]) -> AttentionPlan {
        plan(Spans::text(lens).rows, VisionAttention::Bidirectional)
    }

    /// The golden Llama, with further tensors under `own` for another architecture.
    fn load(golden: &Golden, config: &LlmConfig, own: Option<&str>) -> CausalLm {
        let own = own.map(|prefix| golden.under(prefix)).unwrap_or_default();
        let tensors = golden.under("weights.").into_iter().chain(own);
        let weights = Weights::from_tensors(tensors, Device::Cpu, Kind::Float);
        let llm = CausalLm::load(config, &weights).unwrap();
        weights.finish().unwrap();
        llm
    }

    fn llama(golden: &Golden) -> CausalLm {
        load(golden, &LlmConfig::tiny(64), None)
    }

    #[test]
    fn hidden_states_logits_and_gradients_match_reference() {
        let golden = fixtures::open("llama");
        let llm = llama(&golden);
        let inputs_embeds = llm.embed(&golden["input_ids"]).set_requires_grad(true);
        let output = llm.forward(&inputs_embeds, &text(&[10, 10]), 2);
        assert_eq!(output.hidden_states.len(), 3);
        for (i, hidden) in output.hidden_states.iter().enumerate() {
            fixtures::assert_close_to(hidden, &golden[&format!("hidden_states.{i}")], 1e-5);
        }
        let logits = llm.logits(&output.last_hidden_state);
        fixtures::assert_close_to(&logits, &golden["logits"], 2e-5);
        logits.square().mean(Kind::Float).backward();
        fixtures::assert_close_to(&inputs_embeds.grad(), &golden["grad_inputs_embeds"], 1e-5);
    }

    /// As `LlamaModel.save_pretrained` writes it, and a tied model of which safetensors kept the head's name.
    #[test]
    fn names_without_their_prefix_and_a_head_alone_are_read() {
        let golden = fixtures::open("llama");
        let config = LlmConfig::tiny(64);
        let whole = llama(&golden).tensors();
        let hidden = fixtures::Random::new(4).normal([3, 32]);
        let expected = llama(&golden).logits(&hidden);
        let bare = |name: &str| name.strip_prefix("model.").unwrap_or(name).to_owned();
        let as_head = |name: String| if name.ends_with("embed_tokens.weight") { HEAD.to_owned() } else { name };
        let renames: [&dyn Fn(&str) -> String; 3] =
            [&bare, &|name| as_head(name.to_owned()), &|name| as_head(bare(name))];
        for (rename, trained) in renames.iter().flat_map(|rename| [(rename, false), (rename, true)]) {
            let old = ("model.layers.1.self_attn.rotary_emb.inv_freq".to_owned(), Tensor::zeros([4], F32));
            let tensors = whole.iter().chain([&old]);
            let tensors = tensors.map(|(name, tensor)| (format!("llm.{}", rename(name)), tensor.copy()));
            let weights = Weights::from_tensors(tensors, Device::Cpu, Kind::Float);
            let source = if trained { weights.trained() } else { weights.clone() };
            let llm = CausalLm::load(&config, &source.pp("llm")).unwrap();
            weights.finish().unwrap();
            assert!(llm.config().tie_word_embeddings && llm.logits(&hidden).equal(&expected));
            let parameters = weights.parameters(); // by the names that they have in every other file
            assert!(parameters.iter().all(|(name, _)| name.starts_with("llm.model.")), "{parameters:?}");
        }
        // Where nothing is tied, an embedding that is missing is told.
        let untied = LlmConfig { tie_word_embeddings: false, ..config };
        let tensors = whole.iter().map(|(name, tensor)| (as_head(name.clone()), tensor.copy()));
        let weights = Weights::from_tensors(tensors, Device::Cpu, Kind::Float);
        CausalLm::load(&untied, &weights).unwrap();
        assert!(weights.finish().unwrap_err().to_string().contains("missing    model.embed_tokens.weight"));
    }

    /// Measured with transformers 5.23: tied where the two are equal or one is missing, not tied where they differ.
    #[test]
    fn a_head_of_its_own_is_not_tied_whatever_the_config_says() {
        let golden = fixtures::open("llama");
        let tied = LlmConfig::tiny(64);
        assert!(tied.tie_word_embeddings);
        let untied = LlmConfig { tie_word_embeddings: false, ..tied.clone() };
        let head = fixtures::Random::new(3).normal([64, 32]);
        let load = |config: &LlmConfig, head: Option<&Tensor>| {
            let mut tensors = llama(&golden).tensors();
            tensors.retain(|(name, _)| name != "lm_head.weight");
            tensors.extend(head.map(|head| ("lm_head.weight".to_owned(), head.shallow_clone())));
            let weights = Weights::from_tensors(tensors, Device::Cpu, Kind::Float);
            let llm = CausalLm::load(config, &weights).unwrap();
            weights.finish().unwrap();
            llm
        };
        let hidden = fixtures::Random::new(4).normal([3, 32]);
        let other = load(&tied, Some(&head));
        assert!(!other.config().tie_word_embeddings);
        assert!(other.logits(&hidden).equal(&load(&untied, Some(&head)).logits(&hidden)));
        assert!(other.tensors().iter().any(|(name, tensor)| name == "lm_head.weight" && tensor.equal(&head)));
        let copy = llama(&golden).tensors().remove(0).1;
        for same in [None, Some(&copy)] {
            let llm = load(&tied, same);
            assert!(llm.config().tie_word_embeddings && llm.logits(&hidden).equal(&hidden.matmul(&copy.tr())));
        }
    }

    #[test]
    fn as_many_hidden_states_as_asked_for() {
        let golden = fixtures::open("llama");
        let llm = llama(&golden);
        let embeds = llm.embed(&golden["input_ids"]);
        for n in 0..=2 {
            let found = llm.forward(&embeds, &text(&[10, 10]), n).hidden_states;
            assert_eq!(found.len(), n + 1);
            fixtures::assert_close_to(&found[n], &golden[&format!("hidden_states.{n}")], 1e-5);
        }
    }

    #[test]
    fn other_architectures_match_reference() {
        let golden = fixtures::open("llama");
        let tiny = LlmConfig::tiny(64);
        let of = |model_type: &str| LlmConfig { model_type: model_type.to_owned(), ..tiny.clone() };
        for (name, config) in [
            ("untied", LlmConfig { tie_word_embeddings: false, ..tiny.clone() }),
            ("qwen2", of("qwen2")),
            ("qwen3", LlmConfig { head_dim: Some(8), ..of("qwen3") }),
        ] {
            let llm = load(&golden, &config, Some(&format!("{name}.")));
            let output = llm.forward(&llm.embed(&golden["input_ids"]), &text(&[10, 10]), 0);
            let logits = llm.logits(&output.last_hidden_state);
            fixtures::assert_close_to(&logits, &golden[&format!("logits.{name}")], 5e-5);
        }
    }

    #[test]
    fn images_documents_and_branches_match_reference() {
        let golden = fixtures::open("llama");
        let llm = llama(&golden);
        let rows = vec![
            vec![Span::text(3), Span::image(2, 3), Span::image(1, 2), Span::text(4)],
            vec![
                Span::image(2, 2),
                Span::text(2),
                Span::text(2).in_document(1),
                Span::image(2, 2).in_document(1),
                Span::text(1).in_document(1),
            ],
            vec![
                Span::text(2),
                Span::image(2, 2),
                Span::text(3).on_branch(0),
                Span::text(4).on_branch(1),
                Span::image(1, 2).on_branch(1),
            ],
        ];
        let lens: Vec<i64> = Spans { rows: rows.clone() }.row_lens().collect();
        let plan = plan(rows, VisionAttention::Bidirectional);
        let inputs_embeds = golden["spans.inputs_embeds"].copy().set_requires_grad(true);
        let found = llm.forward(&inputs_embeds, &plan, 0).last_hidden_state;
        let mut loss = Tensor::from(0f32);
        for (row, len) in (0..).zip(lens) {
            let found = found.get(row).narrow(0, 0, len);
            let expected = golden["spans.last_hidden_state"].get(row).narrow(0, 0, len);
            fixtures::assert_close_to(&found, &expected, 1e-5);
            loss += found.square().mean(Kind::Float);
        }
        loss.backward();
        fixtures::assert_close_to(&inputs_embeds.grad(), &golden["spans.grad_inputs_embeds"], 1e-5);
    }

    #[test]
    fn decoding_step_by_step_matches_reference() {
        let golden = fixtures::open("llama");
        let llm = llama(&golden);
        let (prompts, continuation) = (&golden["steps.prompts"], &golden["steps.continuation"]);
        let mut cache = llm.new_cache(2, 12).unwrap();
        for _ in 0..2 {
            cache.reset();
            let mut logits = vec![llm.prefill(&llm.embed(prompts), &text(&[5, 8]), &mut cache).unwrap()];
            for step in 0..4 {
                logits.push(llm.decode_step(&continuation.narrow(1, step, 1), &mut cache).unwrap());
            }
            assert_eq!(cache.lens(), [9, 12]);
            fixtures::assert_close_to(&Tensor::stack(&logits, 1), &golden["steps.logits"], 2e-5);
        }
        let error = llm.decode_step(&continuation.narrow(1, 0, 1), &mut cache).unwrap_err();
        assert!(error.to_string().contains("the cache is full"), "{error}");
        let error = llm.decode_step(continuation, &mut cache).unwrap_err();
        assert!(error.to_string().contains("4 tokens a row in one decoding step"), "{error}");
    }

    /// Greedy tokens behind an image, each from the whole sequence anew and each from the cache.
    #[test]
    fn same_tokens_with_and_without_cache() {
        let llm = CausalLm::load(&LlmConfig::tiny(64), &Weights::random(3, Device::Cpu, Kind::Float)).unwrap();
        let random = fixtures::Random::new(3);
        for mode in [VisionAttention::Bidirectional, VisionAttention::Causal] {
            let row = vec![Span::text(2), Span::image(2, 2), Span::text(3)];
            let embeds = random.normal([1, 9, 32]);
            let mut cache = llm.new_cache(1, 20).unwrap();
            let mut logits = llm.prefill(&embeds, &plan(vec![row.clone()], mode), &mut cache).unwrap();
            let mut whole = embeds;
            for new in 0..8 {
                let mut row = row.clone();
                row.push(Span::text(new));
                row.retain(|span| !span.is_empty());
                let output = llm.forward(&whole, &plan(vec![row], mode), 0);
                let without = llm.logits(&output.last_hidden_state.select(1, -1));
                fixtures::assert_close_to(&logits, &without, 1e-5);
                let token = without.argmax(-1, true); // [1, 1]
                assert!(token.equal(&logits.argmax(-1, true)));
                whole = Tensor::cat(&[&whole, &llm.embed(&token)], 1);
                logits = llm.decode_step(&token, &mut cache).unwrap();
            }
        }
    }

    #[test]
    fn only_adapters_get_gradients() {
        let weights = Weights::random(5, Device::Cpu, Kind::Float);
        let mut llm = CausalLm::load(&LlmConfig::tiny(64), &weights).unwrap();
        let lora = LoraConfig { target_modules: vec!["self_attn.v_proj".into()], ..LoraConfig::new(2, 1) };
        llm.linears_mut(&mut |layer_idx, name, linear| {
            if layer_idx == 0 && lora.target_modules.iter().any(|target| target == name) {
                linear.attach("vision", &lora, &weights.pp(format!("layers.{layer_idx}.{name}")))?;
            }
            Ok(())
        })
        .unwrap();
        let output = llm.forward(&llm.embed(&Tensor::from_slice(&[1i64, 2, 3]).unsqueeze(0)), &text(&[3]), 0);
        llm.logits(&output.last_hidden_state.squeeze_dim(0)).square().mean(Kind::Float).backward();
        let parameters = weights.parameters();
        assert_eq!(parameters.len(), 2);
        let b = &parameters.iter().find(|(name, _)| name.contains("lora_B")).unwrap().1;
        assert!(b.grad().abs().sum(Kind::Float).double_value(&[]) > 0.0);
        for (name, tensor) in llm.tensors() {
            assert!(!tensor.requires_grad() && !tensor.grad().defined(), "{name}");
        }
    }

    #[test]
    fn tensors_are_those_of_the_checkpoint() {
        let golden = fixtures::open("llama");
        for (own, config) in [
            (None, LlmConfig::tiny(64)),
            (Some("untied."), LlmConfig { tie_word_embeddings: false, ..LlmConfig::tiny(64) }),
            (Some("qwen3."), LlmConfig { model_type: "qwen3".into(), ..LlmConfig::tiny(64) }),
        ] {
            let mut found = load(&golden, &config, own).tensors();
            found.sort_by(|a, b| a.0.cmp(&b.0));
            let mut expected = golden.under("weights.");
            expected.extend(own.map(|prefix| golden.under(prefix)).unwrap_or_default());
            expected.sort_by(|a, b| a.0.cmp(&b.0));
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                assert_eq!(found.0, expected.0);
                assert!(found.1.equal(&expected.1), "{}", found.0);
            }
        }
    }

    #[test]
    fn frequencies_and_a_tied_head_in_the_file_are_no_surprise() {
        let golden = fixtures::open("llama");
        let zeros = |shape: &[i64]| Tensor::zeros(shape, F32);
        let more = [
            ("lm_head.weight".to_owned(), zeros(&[64, 32])),
            ("model.layers.1.self_attn.rotary_emb.inv_freq".to_owned(), zeros(&[4])),
        ];
        let tensors = golden.under("weights.").into_iter().chain(more);
        let weights = Weights::from_tensors(tensors, Device::Cpu, Kind::Float);
        CausalLm::load(&LlmConfig::tiny(64), &weights).unwrap();
        weights.finish().unwrap();
    }

    #[test]
    fn bf16_stays_bf16() {
        let weights = Weights::random(5, Device::Cpu, Kind::BFloat16);
        let llm = CausalLm::load(&LlmConfig::tiny(64), &weights).unwrap();
        let rows = vec![vec![Span::text(2), Span::image(2, 2)]];
        let plan =
            AttentionPlan::new(&Spans { rows }, VisionAttention::Bidirectional, Device::Cpu, Kind::BFloat16).unwrap();
        let embeds = fixtures::Random::new(1).normal([1, 6, 32]).to_kind(Kind::BFloat16);
        assert_eq!(llm.forward(&embeds, &plan, 0).last_hidden_state.kind(), Kind::BFloat16);
        let mut cache = llm.new_cache(1, 8).unwrap();
        let logits = llm.prefill(&embeds, &plan, &mut cache).unwrap();
        let logits = llm.decode_step(&logits.argmax(-1, true), &mut cache).unwrap();
        assert_eq!((logits.kind(), logits.size()), (Kind::BFloat16, vec![1, 64]));
    }
}
