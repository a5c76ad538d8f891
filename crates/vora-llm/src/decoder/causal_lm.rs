//! `CausalLm`: a decoder with the head that turns hidden states into logits.

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use vora_files::tell_once;
use vora_lora::Linear;
use vora_torch::nn::decode::{PackedLinear, Width};
use vora_torch::weights::{Init, QuantizedWeight, Weights};

use super::stack::Decoder;
use crate::config::LlmConfig;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// The last norm, as a decoder without a head has it in its file.
const BARE_NORM: &str = "norm.weight";

/// A decoder with its head.
#[derive(Debug)]
pub struct CausalLm {
    pub(super) model: Decoder,
    lm_head: Option<Tensor>,             // [vocab, hidden]; none where the embedding is the head
    embedding_scale: Option<f64>,        // of words alone, rounded to the dtype as in HF
    placeholders: Option<(Tensor, i64)>, // ids, and the id whose embedding they have
    stored_head: Option<PackedLinear>,   // as decoding reads it, of a file whose blocks are kept
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
        let model = Decoder::load(&config, &weights.pp("model"))?;
        let stored_head = if weights.keeps_blocks() {
            let name = if config.tie_word_embeddings { EMBEDDING } else { HEAD };
            Some(match weights.packed(name, [config.vocab_size, config.hidden_size])? {
                Some(packed) => packed,
                None => {
                    PackedLinear::new(lm_head.as_ref().unwrap_or(&model.embed_tokens), plain_width(weights.kind()))?
                }
            })
        } else {
            None
        };
        Ok(Self {
            model,
            lm_head,
            stored_head,
            embedding_scale: config.embedding_scale().map(|scale| rounded(scale, weights.kind())),
            placeholders: None,
            config,
            device: weights.device(),
            kind: weights.kind(),
        })
    }

    /// Embedding, layers and final norm.
    pub fn decoder(&self) -> &Decoder {
        &self.model
    }

    /// Sizes and constants.
    pub fn config(&self) -> &LlmConfig {
        &self.config
    }

    /// Gives these ids the embedding of another: those that hold the places of what is no word, as a model that sees has.
    pub fn embed_as(&mut self, placeholders: &[i64], other: i64) {
        self.placeholders = Some((Tensor::from_slice(placeholders).to_device(self.device), other));
    }

    /// Lets go of its layers, and shares the embedding, the last norm and the head of `other`: what is left puts words among
    /// what is no word for a decoder that several models have in common.
    pub fn share_words_of(&mut self, other: &Self) {
        self.model.layers.clear();
        self.model.embed_tokens = other.model.embed_tokens.shallow_clone();
        self.lm_head = other.lm_head.as_ref().map(Tensor::shallow_clone);
        self.stored_head = None;
    }

    /// Gives embedding and head rows of zeros up to this number, for tokens behind those that it knows; nothing happens where they have as
    /// many already.
    pub fn extend_words(&mut self, rows: i64) {
        let more = rows - self.config.vocab_size;
        if more <= 0 {
            return;
        }
        let extended = |words: &Tensor| {
            let zeros = words.new_zeros([more, self.config.hidden_size], (words.kind(), words.device()));
            Tensor::cat(&[words, &zeros], 0).detach()
        };
        let (embedding, head) = (extended(&self.model.embed_tokens), self.lm_head.as_ref().map(extended));
        (self.model.embed_tokens, self.lm_head, self.stored_head) = (embedding, head, None);
        self.config.vocab_size = rows;
    }

    /// Keeps the embedding in bf16, where every one of its numbers is one in bf16 too: half the memory, for a decoder in f32 whose head
    /// is read from blocks of few bits. Embeddings of words are what they were.
    pub fn narrow_words(&mut self) {
        let embedding = &self.model.embed_tokens;
        if self.device != Device::Cpu || embedding.kind() != Kind::Float || embedding.requires_grad() {
            return;
        }
        let narrow = embedding.to_kind(Kind::BFloat16);
        if narrow.to_kind(Kind::Float).equal(embedding) {
            self.model.embed_tokens = narrow;
        }
    }

    /// Whether it has the words of `other`, number for number, and as many layers: then it is the same model in all likelihood.
    pub fn has_words_of(&self, other: &Self) -> bool {
        let same = |a: &Tensor, b: &Tensor| a.size() == b.size() && a.equal(b);
        self.model.layers.len() == other.model.layers.len()
            && same(&self.model.embed_tokens, &other.model.embed_tokens)
            && same(self.model.norm.weight(), other.model.norm.weight())
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The dtype of hidden states, and of weights that are not trained.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What the weights of its layers are kept in, where a [`PackedDecoder`](crate::PackedDecoder) reads that.
    pub fn width(&self) -> Option<Width> {
        let linears = self.model.layers.first().map(|layer| layer.linears());
        let quantized = linears.and_then(|linears| linears.into_iter().find_map(|(_, linear)| linear.quantized()));
        match (quantized, self.kind) {
            (Some(quantized), _) => quantized.quantization().width(),
            (None, Kind::Float | Kind::BFloat16) => Some(plain_width(self.kind)),
            (None, _) => None,
        }
    }

    /// The embeddings of words, as they go into the first layer: `[..]` -> `[.., hidden]`
    pub fn embed(&self, input_ids: &Tensor) -> Tensor {
        let input_ids = match &self.placeholders {
            Some((ids, other)) => input_ids.masked_fill(&Tensor::isin(input_ids, ids, true, false), *other),
            None => input_ids.shallow_clone(),
        };
        let words = Tensor::embedding(&self.model.embed_tokens, &input_ids, -1, false, false).to_kind(self.kind);
        match self.embedding_scale {
            Some(scale) => words * scale,
            None => words,
        }
    }

    /// Logits where they are asked for: `[n, hidden]` -> `[n, vocab]`
    ///
    /// For a Chameleon they are as the head gives them: HF's forward puts those of image codes to the lowest number,
    /// which is the business of whoever samples text.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        let logits = hidden.linear::<&Tensor>(&self.head().to_kind(hidden.kind()), None);
        match self.config.softcap() {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        }
    }

    /// The head's weight, `[vocab, hidden]`.
    pub(super) fn head(&self) -> &Tensor {
        self.lm_head.as_ref().unwrap_or(&self.model.embed_tokens)
    }

    /// The head as decoding reads it, of a file whose blocks are kept ([`Weights::keeping_blocks`]).
    pub(super) fn stored_head(&self) -> Option<&PackedLinear> {
        self.stored_head.as_ref()
    }

    /// Whether the head's own weight is trained, tied to the embedding or not.
    pub fn trains_head(&self) -> bool {
        self.head().requires_grad()
    }

    /// Visits every linear layer of the blocks, by its name in a checkpoint: `model.layers.0.self_attn.q_proj`.
    ///
    /// # Errors
    /// The first that `visit` returns.
    pub fn linears_mut(&mut self, visit: &mut dyn FnMut(&str, &mut Linear) -> Result<()>) -> Result<()> {
        for (layer_idx, layer) in self.model.layers.iter_mut().enumerate() {
            for (name, linear) in layer.linears_mut() {
                visit(&format!("model.layers.{layer_idx}.{name}"), linear)?;
            }
        }
        Ok(())
    }

    /// As [`CausalLm::linears_mut`], without changing them.
    ///
    /// # Errors
    /// The first that `visit` returns.
    pub fn linears(&self, visit: &mut dyn FnMut(&str, &Linear) -> Result<()>) -> Result<()> {
        for (layer_idx, layer) in self.model.layers.iter().enumerate() {
            for (name, linear) in layer.linears() {
                visit(&format!("model.layers.{layer_idx}.{name}"), linear)?;
            }
        }
        Ok(())
    }

    /// Every tensor of a plain checkpoint, by HF's name, adapters left out: merge them first. Trained ones are the f32
    /// masters themselves, those that are kept in few bits new ones; [`CausalLm::stored`] leaves these as they are.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        self.tensors_with(|linear| Some(linear.weight()))
    }

    /// As [`CausalLm::tensors`], with weights in groups of few bits as `compressed-tensors` stores them; see
    /// [`QuantizedWeight::stored`].
    ///
    /// # Errors
    /// Where memory is short.
    pub fn stored(&self) -> Result<Vec<(String, Tensor)>> {
        let is_packed = |linear: &Linear| linear.quantized().and_then(QuantizedWeight::packed).is_some();
        let mut tensors = self.tensors_with(|linear| (!is_packed(linear)).then(|| linear.weight()));
        self.linears(&mut |path, linear| {
            let parts = linear.quantized().map(QuantizedWeight::stored).transpose()?.flatten();
            tensors.extend(parts.into_iter().flatten().map(|(part, t)| (format!("{path}.weight{part}"), t)));
            Ok(())
        })?;
        Ok(tensors)
    }

    /// As [`CausalLm::tensors`], without the weights that are kept in few bits or shared by several processes.
    pub fn plain_tensors(&self) -> Vec<(String, Tensor)> {
        self.tensors_with(|linear| linear.plain().map(Tensor::shallow_clone))
    }

    /// All tensors, with what `weight` gives for the weights of the linear layers.
    fn tensors_with(&self, weight: impl Fn(&Linear) -> Option<Tensor>) -> Vec<(String, Tensor)> {
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), self.model.embed_tokens.shallow_clone())];
        for (layer_idx, layer) in self.model.layers.iter().enumerate() {
            let mut push = |name: &str, tensor: &Tensor| {
                tensors.push((format!("model.layers.{layer_idx}.{name}"), tensor.shallow_clone()));
            };
            for (name, linear) in layer.linears() {
                if let Some(weight) = weight(linear) {
                    push(&format!("{name}.weight"), &weight);
                }
                if let Some(bias) = linear.bias() {
                    push(&format!("{name}.bias"), bias);
                }
            }
            for (name, tensor) in layer.other_tensors() {
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

/// The width of what is in no blocks.
pub(super) fn plain_width(kind: Kind) -> Width {
    if kind == Kind::Float { Width::F32 } else { Width::Bf16 }
}

/// A number as the dtype has it.
fn rounded(number: f64, kind: Kind) -> f64 {
    Tensor::from(number).to_kind(kind).double_value(&[])
}

/// Whether a checkpoint has both an embedding and a head, which differ in the dtype that they are loaded in.
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
pub(super) mod tests {
    use super::*;
    use fixtures::Golden;
    use vora_lora::{LoraConfig, attach_all};

    use crate::{AttentionPlan, VisionAttention};
    use vora_text::{Span, Spans};

    const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

    pub(in crate::decoder) fn plan(rows: Vec<Vec<Span>>, mode: VisionAttention) -> AttentionPlan {
        AttentionPlan::new(&Spans::new(rows), mode, Device::Cpu, Kind::Float).unwrap()
    }

    pub(in crate::decoder) fn text(lens: &[i64]) -> AttentionPlan {
        plan(Spans::text(lens).into_rows(), VisionAttention::Bidirectional)
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

    pub(in crate::decoder) fn llama(golden: &Golden) -> CausalLm {
        load(golden, &LlmConfig::tiny(64), None)
    }

    #[test]
    fn hidden_states_logits_and_gradients_match_reference() {
        let golden = fixtures::open("llama");
        let llm = llama(&golden);
        let inputs_embeds = llm.embed(&golden["input_ids"]).set_requires_grad(true);
        let output = llm.decoder().forward(&inputs_embeds, &text(&[10, 10]), 2);
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
            let found = llm.decoder().forward(&embeds, &text(&[10, 10]), n).hidden_states;
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
            let output = llm.decoder().forward(&llm.embed(&golden["input_ids"]), &text(&[10, 10]), 0);
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
        let lens: Vec<i64> = Spans::new(rows.clone()).row_lens().collect();
        let plan = plan(rows, VisionAttention::Bidirectional);
        let inputs_embeds = golden["spans.inputs_embeds"].copy().set_requires_grad(true);
        let found = llm.decoder().forward(&inputs_embeds, &plan, 0).last_hidden_state;
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
    fn only_adapters_get_gradients() {
        let weights = Weights::random(5, Device::Cpu, Kind::Float);
        let mut llm = CausalLm::load(&LlmConfig::tiny(64), &weights).unwrap();
        let lora = LoraConfig { target_modules: vec!["self_attn.v_proj".into()], ..LoraConfig::new(2, 1) };
        let adapters = Weights::random(6, Device::Cpu, Kind::Float);
        attach_all("vision", &lora, &adapters, |visit| llm.linears_mut(visit)).unwrap();
        let output = llm.decoder().forward(&llm.embed(&Tensor::from_slice(&[1i64, 2, 3]).unsqueeze(0)), &text(&[3]), 0);
        llm.logits(&output.last_hidden_state.squeeze_dim(0)).square().mean(Kind::Float).backward();
        assert!(weights.parameters().is_empty());
        let parameters = adapters.parameters();
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
    fn words_are_added_behind_the_others() {
        for tied in [true, false] {
            let config = LlmConfig { tie_word_embeddings: tied, ..LlmConfig::tiny(64) };
            let mut llm = CausalLm::load(&config, &Weights::random(3, Device::Cpu, Kind::Float)).unwrap();
            let hidden = fixtures::Random::new(4).normal([3, 32]);
            let before = llm.logits(&hidden);
            llm.extend_words(60);
            assert_eq!(llm.config().vocab_size, 64);
            llm.extend_words(66);
            let logits = llm.logits(&hidden);
            assert_eq!((llm.config().vocab_size, logits.size()), (66, vec![3, 66]));
            assert!(
                logits.narrow(1, 0, 64).equal(&before) && logits.narrow(1, 64, 2).abs().max().double_value(&[]) == 0.0
            );
            assert_eq!(llm.embed(&Tensor::from_slice(&[65i64])).abs().max().double_value(&[]), 0.0);
        }
    }

    #[test]
    fn words_are_narrowed_where_that_loses_nothing() {
        let ids = Tensor::from_slice(&[3i64, 0, 63]);
        for (kind, expected) in [(Kind::BFloat16, Kind::BFloat16), (Kind::Float, Kind::Float)] {
            let random = Weights::random(3, Device::Cpu, Kind::Float);
            let mut tensors = CausalLm::load(&LlmConfig::tiny(64), &random).unwrap().tensors();
            tensors.iter_mut().for_each(|(_, tensor)| *tensor = tensor.to_kind(kind));
            let weights = Weights::from_tensors(tensors, Device::Cpu, Kind::Float);
            let mut llm = CausalLm::load(&LlmConfig::tiny(64), &weights).unwrap();
            let embeds = llm.embed(&ids);
            let logits = llm.logits(&embeds);
            llm.narrow_words();
            assert_eq!(llm.model.embed_tokens.kind(), expected);
            let found = llm.embed(&ids);
            assert!(found.kind() == Kind::Float && found.equal(&embeds) && llm.logits(&found).equal(&logits));
        }
    }

    #[test]
    fn bf16_stays_bf16() {
        let weights = Weights::random(5, Device::Cpu, Kind::BFloat16);
        let llm = CausalLm::load(&LlmConfig::tiny(64), &weights).unwrap();
        let rows = vec![vec![Span::text(2), Span::image(2, 2)]];
        let plan =
            AttentionPlan::new(&Spans::new(rows), VisionAttention::Bidirectional, Device::Cpu, Kind::BFloat16).unwrap();
        let embeds = fixtures::Random::new(1).normal([1, 6, 32]).to_kind(Kind::BFloat16);
        assert_eq!(llm.decoder().forward(&embeds, &plan, 0).last_hidden_state.kind(), Kind::BFloat16);
        let mut cache = llm.new_cache(1, 8).unwrap();
        let logits = llm.prefill(&embeds, &plan, &mut cache).unwrap();
        let logits = llm.decode_step(&logits.argmax(-1, true), &mut cache).unwrap();
        assert_eq!((logits.kind(), logits.size()), (Kind::BFloat16, vec![1, 64]));
    }
}
