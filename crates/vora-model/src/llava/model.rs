//! LLaVA (arXiv 2304.08485, 2310.03744): a vision encoder, whose hidden states a small projection takes into the space of
//! word embeddings.
//!
//! A folder is that of Hugging Face's `LlavaForConditionalGeneration` under its published names: `language_model.model`,
//! `language_model.lm_head`, `vision_tower`, `multi_modal_projector`. The names of its classes since 2025
//! (`model.language_model`, `lm_head`, `model.vision_tower`, …) are read too.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};
use tch::nn::Module;
use tch::{Device, Kind, Tensor};
use vora_llm::{CausalLm, VisionAttention};
use vora_lora::{Linear, LoraConfig, Visit, attach_all, in_layer, merge_state_dict};
use vora_torch::weights::Weights;
use vora_vision::{Encoder, VisionFeatureSelectStrategy};

use super::projector::MultiModalProjector;
use super::{ALL_LINEAR, LlavaConfig};
use crate::adapted::{AdaptedLlm, detach, ensure_finite, under};
use crate::few_bits::describe;
use crate::model::VisionLanguageModel;

/// A decoder that sees through an encoder, which may carry adapters or be trained as the decoder may.
#[derive(Debug)]
pub struct Llava {
    config: LlavaConfig, // but for `llm` and `lora`, which `llm` knows
    llm: AdaptedLlm,
    vision_tower: Encoder, // with the adapters of `config.vision_lora`
    multi_modal_projector: MultiModalProjector,
}

impl Llava {
    /// Takes `language_model`, `vision_tower` and `multi_modal_projector` from one source. Adapters that the config
    /// names are attached and taken from the same source.
    ///
    /// # Errors
    /// Where the config contradicts itself; tensors that do not fit are told by [`Weights::finish_allowing`], for which
    /// [`EncoderConfig::leaves_out`](vora_vision::EncoderConfig::leaves_out) says what the encoder does not read.
    pub fn load(config: LlavaConfig, weights: &Weights) -> Result<Self> {
        let vision_tower = Encoder::load(&config.encoder()?, &weights.pp("vision_tower")).context("vision_config")?;
        Self::assemble(config, &weights.pp("language_model"), vision_tower, weights)
    }

    /// Builds a LLaVA from an LLM's own folder and an encoder: projection and adapters come from `trained`.
    ///
    /// # Errors
    /// As [`Llava::load`].
    pub fn assemble(mut config: LlavaConfig, llm: &Weights, vision_tower: Encoder, trained: &Weights) -> Result<Self> {
        let llm = AdaptedLlm::new(CausalLm::load(&config.llm, llm)?);
        let (lora, vision_lora) = (config.lora.take(), config.vision_lora.take());
        config.features.hidden_state_indices(vision_tower.num_hidden_layers())?;
        let mut model = Self {
            llm,
            multi_modal_projector: MultiModalProjector::load(
                &config,
                vision_tower.hidden_size(),
                &trained.pp("multi_modal_projector"),
            )?,
            vision_tower,
            config,
        };
        if let Some(lora) = lora {
            model.attach(ADAPTER, &lora, &trained.pp("language_model"))?;
        }
        if let Some(lora) = vision_lora {
            model.attach_to_tower(lora, trained)?;
        }
        Ok(model)
    }

    /// Opens a folder, a published one or one that [`Llava::save`](VisionLanguageModel::save) wrote.
    ///
    /// # Errors
    /// Names the file, and what in it does not fit.
    pub fn open(folder: &Path, device: Device, kind: Kind) -> Result<Self> {
        let config = LlavaConfig::open(folder)?;
        let weights = published_names(Weights::open(folder, device, kind)?)?;
        let encoder = config.encoder()?;
        let model = Self::load(config, &weights).with_context(|| format!("in {}", folder.display()))?;
        weights
            .finish_allowing(|name| name.strip_prefix("vision_tower.").is_some_and(|name| encoder.leaves_out(name)))
            .with_context(|| format!("loading {}", folder.display()))?;
        Ok(model)
    }

    /// What it is made of.
    pub fn config(&self) -> LlavaConfig {
        LlavaConfig { llm: self.llm().config().clone(), lora: self.lora().cloned(), ..self.config.clone() }
    }

    /// The encoder.
    pub fn vision_tower(&self) -> &Encoder {
        &self.vision_tower
    }

    /// Puts an adapter on the encoder's linear layers that `lora` asks for, in the blocks that run.
    fn attach_to_tower(&mut self, mut lora: LoraConfig, weights: &Weights) -> Result<()> {
        let tower = self.vision_tower.model_mut();
        let num_layers = self.config.features.num_blocks(tower.num_hidden_layers())?;
        ensure!(num_layers > 0, "vision_lora: vision_feature_layer reads what goes into the encoder's first block");
        if lora.target_modules == [ALL_LINEAR] {
            let mut modules = BTreeSet::new();
            tower.linears(&mut |path, _| {
                modules.insert(in_layer(path).1.to_owned());
                Ok(())
            })?;
            lora.target_modules = modules.into_iter().collect();
        }
        let lora = lora.over(num_layers);
        let linears = |visit: &mut Visit<'_>| tower.linears_mut(num_layers, visit);
        attach_all(ADAPTER, &lora, &weights.pp("vision_tower"), linears).map_err(|error| of_the_tower(&error))?;
        self.config.vision_lora = Some(lora);
        Ok(())
    }

    /// The encoder with its adapters folded into its weights: in f32, rounded once to the dtype that each is stored in.
    fn merged_tower(&self, lora: &LoraConfig) -> Result<Encoder> {
        let mut tensors = under(TOWER, self.vision_tower.current_tensors());
        self.vision_tower.model().linears(&mut |path, linear| {
            let parts = linear.adapters().flat_map(|adapter| adapter.tensors());
            tensors.extend(parts.map(|(part, tensor)| (format!("{TOWER}{path}.{part}"), tensor.shallow_clone())));
            Ok(())
        })?;
        let merged = merge_state_dict(tensors, lora)?.into_iter();
        let own = merged.map(|(name, tensor)| (name.strip_prefix(TOWER).unwrap_or(&name).to_owned(), tensor));
        self.vision_tower.with_tensors(own.collect())
    }
}

/// The name of the adapters.
const ADAPTER: &str = "default";

/// What stands before the encoder's own names in the folder.
const TOWER: &str = "vision_tower.";

/// An error about the key `lora`, told about `vision_lora`.
fn of_the_tower(error: &anyhow::Error) -> anyhow::Error {
    let text = format!("{error:#}");
    match text.strip_prefix("lora.") {
        Some(rest) => anyhow!("vision_lora.{rest}"),
        None => anyhow!("vision_lora: {text}"),
    }
}

impl VisionLanguageModel for Llava {
    fn adapted(&self) -> &AdaptedLlm {
        &self.llm
    }

    fn adapted_mut(&mut self) -> &mut AdaptedLlm {
        &mut self.llm
    }

    fn encoder_tensors(&self) -> Vec<(String, Tensor)> {
        let is_trained = |name: &str| self.vision_tower.trained().iter().any(|(other, _)| other == name);
        let tensors = self.vision_tower.tensors().iter();
        tensors.filter(|(name, _)| !is_trained(name)).map(|(name, t)| (name.clone(), t.shallow_clone())).collect()
    }

    fn encoder(&self) -> Option<&Encoder> {
        Some(&self.vision_tower)
    }

    fn vision_lora(&self) -> Option<&LoraConfig> {
        self.config.vision_lora.as_ref()
    }

    fn linears(&self, visit: &mut dyn FnMut(&str, &Linear) -> Result<()>) -> Result<()> {
        self.llm().linears(&mut |path, linear| visit(&format!("{}{path}", self.llm_prefix()), linear))?;
        self.vision_tower.model().linears(&mut |path, linear| visit(&format!("{TOWER}{path}"), linear))
    }

    /// Adapters of the LLM alone are the LLM's; with those of the encoder they are those of Hugging Face's
    /// `LlavaForConditionalGeneration`, under the names that its modules have since transformers 5.
    fn peft_name(&self, name: &str) -> Option<String> {
        if self.vision_lora().is_none() {
            return name.strip_prefix(self.llm_prefix()).map(str::to_owned);
        }
        match (name.strip_prefix("language_model."), name.strip_prefix(TOWER)) {
            (Some(own), _) => Some(match own.strip_prefix("model.") {
                Some(in_decoder) => format!("model.language_model.{in_decoder}"),
                None => own.to_owned(),
            }),
            (None, Some(own)) => Some(format!("model.{TOWER}{}", self.vision_tower.module_name(own))),
            (None, None) => None,
        }
    }

    /// Of LLM and encoder together: every module by its whole path, as two configurations do not share targets.
    fn peft_config(&self) -> Result<Option<LoraConfig>> {
        if self.vision_lora().is_none() {
            return Ok(self.lora().cloned());
        }
        let mut modules: Vec<(String, i64, f64)> = Vec::new(); // path, r and alpha
        self.linears(&mut |path, linear| {
            if let Some(adapter) = linear.adapters().next() {
                let path = self.peft_name(path).with_context(|| format!("{path} is no part of a LLaVA"))?;
                modules.push((path, adapter.r(), adapter.scaling() * adapter.r() as f64));
            }
            Ok(())
        })?;
        let Some(&(_, r, alpha)) = modules.first() else { return Ok(None) };
        let others = || modules.iter().filter(move |(_, other, other_alpha)| (*other, *other_alpha) != (r, alpha));
        Ok(Some(LoraConfig {
            lora_alpha: Some(alpha),
            rank_pattern: others().map(|(path, r, _)| (path.clone(), *r)).collect(),
            alpha_pattern: others().map(|(path, _, alpha)| (path.clone(), *alpha)).collect(),
            ..LoraConfig::of_modules(r, modules.iter().map(|(path, ..)| path.clone()))
        }))
    }

    fn merge(&mut self) -> Result<()> {
        let Some(lora) = self.config.vision_lora.clone() else { return self.llm.merge() };
        self.vision_tower.model().linears(&mut |path, linear| ensure_finite(&format!("{TOWER}{path}"), linear))?;
        self.llm.merge()?;
        self.vision_tower = self.merged_tower(&lora)?;
        self.config.vision_lora = None;
        Ok(())
    }

    fn detach(&mut self) -> Result<()> {
        let num_layers = self.vision_tower.num_hidden_layers();
        self.vision_tower.model_mut().linears_mut(num_layers, &mut |_, linear| detach(linear))?;
        self.config.vision_lora = None;
        self.llm.detach()
    }

    /// The encoder has let the tokens of a picture see each other already.
    fn vision_attention(&self) -> VisionAttention {
        VisionAttention::Causal
    }

    /// `LlavaProcessor`.
    fn has_processor(&self) -> bool {
        true
    }

    /// The encoder's grid of patches, or one row of all tokens where others stand before the patches.
    ///
    /// # Errors
    /// Where the picture is smaller than a patch.
    fn image_grid(&self, height: i64, width: i64) -> Result<(i64, i64)> {
        let encoder = self.vision_tower.model();
        let (rows, cols) = encoder.grid(height, width)?;
        Ok(match (self.config.features.vision_feature_select_strategy, encoder.num_prefix_tokens()) {
            (VisionFeatureSelectStrategy::Full, prefix) if prefix > 0 => (1, prefix + rows * cols),
            _ => (rows, cols),
        })
    }

    fn image_features(&self, pixel_values: &Tensor) -> Tensor {
        let see = || self.vision_tower.features(pixel_values, &self.config.features);
        let learns = self.vision_lora().is_some() || !self.vision_tower.trained().is_empty();
        let features = if learns { see() } else { tch::no_grad(see) };
        let features = features.expect("callers check the grid, and loading the layers");
        self.multi_modal_projector.forward(&features)
    }

    fn llm_prefix(&self) -> &'static str {
        "language_model."
    }

    /// With the LLM's dtype as `dtype`, whichever it was once stored in.
    fn config_json(&self) -> Result<Value> {
        let mut json = self.config().to_json()?;
        let dtype = match self.llm().kind() {
            Kind::BFloat16 => "bfloat16",
            Kind::Half => "float16",
            _ => "float32",
        };
        json["dtype"] = json!(dtype);
        describe(&self.llm, &mut json);
        Ok(json)
    }

    /// The published layout, with the encoder as it was read, but for what was trained of it, in f32.
    ///
    /// # Errors
    /// Where adapters are still apart from the weights, or the encoder is in no file.
    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let llm = self.llm.merged()?;
        ensure!(self.vision_lora().is_none(), "the adapters are still apart from the weights: merge first");
        let tower = self.vision_tower.current_tensors();
        ensure!(!tower.is_empty(), "the vision encoder was made in memory: there are no tensors to write");
        let mut tensors = under(self.llm_prefix(), llm.stored()?);
        tensors.extend(under(TOWER, tower));
        tensors.extend(under("multi_modal_projector.", self.multi_modal_projector.tensors()));
        Ok(tensors)
    }
}

/// The same source under the published names, where it has the newer ones.
fn published_names(weights: Weights) -> Result<Weights> {
    if !weights.contains("model.language_model.embed_tokens.weight") {
        return Ok(weights);
    }
    let renamed = |name: String| {
        let own = name.strip_prefix("model.").unwrap_or(&name);
        match own.strip_prefix("language_model.") {
            Some(decoder) => format!("language_model.model.{decoder}"),
            None if own == "lm_head.weight" => "language_model.lm_head.weight".to_owned(),
            None if own.starts_with("vision_tower.") || own.starts_with("multi_modal_projector.") => own.to_owned(),
            None => name,
        }
    };
    let tensors = weights.stored()?.into_iter().map(|(name, tensor)| (renamed(name), tensor));
    Ok(Weights::from_tensors(tensors, weights.device(), weights.kind()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use fixtures::Golden;
    use vora_llm::LlmConfig;
    use vora_lora::LoraConfig;
    use vora_text::{Span, Spans};
    use vora_torch::checkpoint::save;
    use vora_vision::EncoderConfig;

    use crate::files::save_folder;
    use crate::llava::MmProjectorType;
    use crate::model::Input;

    /// What the golden file has: CLIP as in LLaVA-1.5, two layers of all its tokens, SigLIP, DINOv2.
    const CASES: [&str; 4] = ["clip", "layers", "siglip", "dinov2"];

    fn json(name: &str) -> Value {
        let text = std::fs::read(fixtures::root().join("golden/llava.json")).unwrap();
        serde_json::from_slice::<Value>(&text).unwrap()[name].take()
    }

    fn config(name: &str) -> LlavaConfig {
        LlavaConfig::from_json(json(name).as_object().unwrap().clone()).unwrap()
    }

    fn weights(golden: &Golden, name: &str, kind: Kind) -> Weights {
        Weights::from_tensors(golden.under(&format!("{name}.weights.")), Device::Cpu, kind)
    }

    fn model(golden: &Golden, name: &str) -> Llava {
        Llava::load(config(name), &weights(golden, name, Kind::Float)).unwrap()
    }

    /// The rows that the golden file was made from: a picture among words, and a shorter row with another elsewhere.
    fn input(golden: &Golden, name: &str, model: &Llava) -> Input {
        let input_ids = golden[&format!("{name}.input_ids")].shallow_clone();
        let pixel_values = golden["pixel_values"].unbind(0);
        let (rows, cols) = model.image_grid(8, 8).unwrap();
        let row = |before, after| vec![Span::text(before), Span::image(rows, cols), Span::text(after)];
        Input::new(input_ids, pixel_values, Spans::new(vec![row(3, 4), row(1, 3)]))
    }

    /// Logits of the rows, padding left out: `[tokens, vocab]`
    fn logits(model: &Llava, input: &Input) -> Tensor {
        let output = tch::no_grad(|| model.forward(input, 0)).unwrap();
        told(&tch::no_grad(|| model.llm().logits(&output.last_hidden_state)), input)
    }

    fn told(rows: &Tensor, input: &Input) -> Tensor {
        let lens = input.spans.row_lens();
        Tensor::cat(&(0..).zip(lens).map(|(row, len)| rows.get(row).narrow(0, 0, len)).collect::<Vec<_>>(), 0)
    }

    fn bytes(folder: &Path) -> BTreeMap<String, (Kind, Vec<i64>, Vec<u8>)> {
        let tensors = Tensor::read_safetensors(folder.join("model.safetensors")).unwrap();
        let of = |t: &Tensor| Vec::<u8>::try_from(t.contiguous().view([-1]).view_dtype(Kind::Uint8)).unwrap();
        tensors.into_iter().map(|(name, t)| (name, (t.kind(), t.size(), of(&t)))).collect()
    }

    #[test]
    fn matches_reference() {
        let golden = fixtures::open("llava");
        for name in CASES {
            let model = model(&golden, name);
            let input = input(&golden, name, &model);
            let features = model.image_features(&golden["pixel_values"]);
            fixtures::assert_close_to(&features, &golden[&format!("{name}.image_features")], 1e-5);
            let expected = told(&golden[&format!("{name}.logits")], &input);
            fixtures::assert_close_to(&logits(&model, &input), &expected, 1e-5);
        }
    }

    #[test]
    fn the_head_is_tied_where_either_flag_says_so_and_the_tensors_agree() {
        let golden = fixtures::open("llava");
        let weights = golden.under("clip.weights.");
        let tensor = |name: &str| weights.iter().find_map(|(n, t)| (n == name).then(|| t.copy())).unwrap();
        let embedding = tensor("language_model.model.embed_tokens.weight");
        let other = fixtures::Random::new(4).normal(embedding.size());
        let hidden = fixtures::Random::new(5).normal([2, embedding.size()[1]]);
        let root = tempfile::tempdir().unwrap();
        let (yes, no) = (Some(true), Some(false));
        // At the top, in text_config, and what transformers 5.23.0 makes of it.
        for (top, text, ties) in [
            (None, None, false),
            (None, yes, true),
            (None, no, false),
            (yes, None, true),
            (yes, yes, true),
            (yes, no, true),
            (no, None, false),
            (no, yes, true),
            (no, no, false),
        ] {
            for head in [Some(&embedding), Some(&other), None] {
                let mut config = json("clip");
                for (place, flag) in [("", top), ("text_config", text)] {
                    let keys = if place.is_empty() { &mut config } else { &mut config[place] };
                    let keys = keys.as_object_mut().unwrap();
                    keys.remove("tie_word_embeddings");
                    keys.extend(flag.map(|flag| ("tie_word_embeddings".to_owned(), flag.into())));
                }
                let mut tensors: Vec<(String, Tensor)> = golden.under("clip.weights.").into_iter().collect();
                tensors.retain(|(name, _)| name != "language_model.lm_head.weight");
                tensors.extend(head.map(|head| ("language_model.lm_head.weight".to_owned(), head.copy())));
                let folder = root.path().join("llava");
                save_folder(&folder, &config, &tensors).unwrap();
                let found = Llava::open(&folder, Device::Cpu, Kind::Float);
                let what =
                    format!("top {top:?}, text_config {text:?}, head {:?}", head.map(|head| head.equal(&embedding)));
                let Some(head) = head.or(ties.then_some(&embedding)) else {
                    let error = format!("{:#}", found.unwrap_err());
                    assert!(error.contains("missing    language_model.lm_head.weight"), "{what}: {error}");
                    continue;
                };
                let model = found.unwrap();
                assert_eq!(model.llm().config().tie_word_embeddings, ties && head.equal(&embedding), "{what}");
                assert!(model.llm().logits(&hidden).equal(&hidden.linear::<&Tensor>(head, None)), "{what}");
                let written = model.config_json().unwrap();
                let written = [&written, &written["text_config"]].map(|keys| keys["tie_word_embeddings"].clone());
                assert_eq!(written, [json!(ties && head.equal(&embedding)), json!(ties && head.equal(&embedding))]);
            }
        }
    }

    #[test]
    fn a_class_token_makes_no_grid() {
        let golden = fixtures::open("llava");
        let grids = CASES.map(|name| model(&golden, name).image_grid(8, 12).unwrap());
        assert_eq!(grids, [(2, 3), (1, 7), (2, 3), (2, 3)]);
    }

    #[test]
    fn a_folder_there_and_back_changes_no_byte_of_a_tensor() {
        let golden = fixtures::open("llava");
        let root = tempfile::tempdir().unwrap();
        for name in CASES {
            for kind in [Kind::Float, Kind::BFloat16] {
                let (there, back) = (root.path().join("there"), root.path().join("back"));
                let tensors = golden.under(&format!("{name}.weights.")).into_iter();
                let tensors: Vec<_> = tensors.map(|(name, tensor)| (name, tensor.to_kind(kind))).collect();
                save_folder(&there, &json(name), &tensors).unwrap();
                Llava::open(&there, Device::Cpu, kind).unwrap().save(&back).unwrap();
                assert!(bytes(&there) == bytes(&back), "{name}, {kind:?}");
                let again = LlavaConfig::open(&back).unwrap();
                assert_eq!(again.to_json().unwrap(), config(name).to_json().unwrap());
            }
        }
    }

    #[test]
    fn the_newer_names_are_read_and_the_published_ones_written() {
        let golden = fixtures::open("llava");
        let root = tempfile::tempdir().unwrap();
        let newer: BTreeMap<String, String> = serde_json::from_value(json("newer_names")).unwrap();
        let published = golden.under("layers.weights.");
        let tensors: Vec<_> = published.into_iter().map(|(name, tensor)| (newer[&name].clone(), tensor)).collect();
        assert!(tensors.iter().any(|(name, _)| name == "lm_head.weight"));
        save_folder(root.path(), &json("layers"), &tensors).unwrap();
        let model = Llava::open(root.path(), Device::Cpu, Kind::Float).unwrap();
        assert!(logits(&model, &input(&golden, "layers", &model)).equal(&{
            let model = self::model(&golden, "layers");
            logits(&model, &input(&golden, "layers", &model))
        }));
        model.save(&root.path().join("back")).unwrap();
        assert!(newer.keys().eq(bytes(&root.path().join("back")).keys()));
    }

    #[test]
    fn assembled_of_two_folders_it_trains_projection_and_adapters() {
        let golden = fixtures::open("llava");
        let root = tempfile::tempdir().unwrap();
        let (tower, llm) = (root.path().join("tower"), root.path().join("llm"));
        let whole = model(&golden, "clip");
        whole.save_llm(&llm).unwrap();
        save_folder(&tower, &json("clip")["vision_config"], whole.vision_tower().tensors()).unwrap();

        let frozen = Weights::open(&llm, Device::Cpu, Kind::BFloat16).unwrap();
        let encoder = Encoder::open(&tower, Device::Cpu, Kind::BFloat16).unwrap();
        let trained = Weights::random(3, Device::Cpu, Kind::BFloat16);
        let mut config = LlavaConfig::new(LlmConfig::open(&llm).unwrap(), &tower).unwrap();
        config.mm_projector_type = MmProjectorType::Linear;
        config.lora = Some(LoraConfig::new(2, 1));
        let mut model = Llava::assemble(config, &frozen, encoder, &trained).unwrap();
        frozen.finish().unwrap();
        assert_eq!(model.lora(), Some(&LoraConfig::new(2, 1)));
        let parameters = trained.parameters();
        let expected = |name: &str| parameters.iter().any(|(found, _)| found == name);
        assert!(expected("multi_modal_projector.linear_1.bias") && !expected("multi_modal_projector.linear_2.bias"));
        assert!(expected("language_model.model.layers.0.mlp.down_proj.lora_B.weight"));
        assert_eq!(parameters.len(), 2 + 2 * 7);

        let input = input(&golden, "clip", &model);
        let output = model.forward(&input, 0).unwrap();
        assert_eq!(output.last_hidden_state.kind(), Kind::BFloat16);
        output.last_hidden_state.square().mean(Kind::Float).backward();
        for (name, parameter) in &parameters {
            let zero = name.contains("lora_A"); // as long as B is zero
            assert_eq!(parameter.grad().abs().max().double_value(&[]) == 0.0, zero, "{name}");
        }

        let error = model.save(&root.path().join("apart")).unwrap_err().to_string();
        assert!(error.contains("merge first"), "{error}");
        assert_eq!(model.config_json().unwrap()["lora"]["r"], 2);
        model.merge().unwrap();
        let merged = root.path().join("merged");
        model.save(&merged).unwrap();
        assert!(model.lora().is_none() && model.config_json().unwrap().get("lora").is_none());
        // The trained projection keeps its f32, the encoder what it is stored in.
        let kinds = bytes(&merged);
        let kind = |name: &str| kinds[name].0;
        assert_eq!(kind("multi_modal_projector.linear_1.weight"), Kind::Float);
        assert_eq!(kind("vision_tower.vision_model.embeddings.class_embedding"), Kind::Float);
        assert_eq!(kind("language_model.model.norm.weight"), Kind::BFloat16);
        let again = Llava::open(&merged, Device::Cpu, Kind::BFloat16).unwrap();
        assert!(logits(&again, &input).equal(&logits(&model, &input)));
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let golden = fixtures::open("llava");
        let refuse = |change: &dyn Fn(&mut LlavaConfig)| {
            let mut config = config("clip");
            change(&mut config);
            format!("{:#}", Llava::load(config, &weights(&golden, "clip", Kind::Float)).unwrap_err())
        };
        let error =
            refuse(&|config| config.features = serde_json::from_value(json!({"vision_feature_layer": 4})).unwrap());
        assert_eq!(error, "vision_feature_layer is 4, an encoder of 2 blocks has -3 to 2");
        assert!(refuse(&|config| config.lora = Some(LoraConfig::new(2, 9))).contains("lora.layers is 9"));

        let folder = tempfile::tempdir().unwrap();
        let mut tensors = golden.under("clip.weights.");
        tensors.retain(|(name, _)| name != "multi_modal_projector.linear_2.bias");
        tensors.push(("vision_tower.vision_model.encoder.layers.2.mlp.fc1.bias".into(), Tensor::from_slice(&[0f32])));
        save_folder(folder.path(), &json("clip"), &[]).unwrap();
        save(&folder.path().join("model.safetensors"), &tensors, &[]).unwrap();
        let error = format!("{:#}", Llava::open(folder.path(), Device::Cpu, Kind::Float).unwrap_err());
        assert!(error.contains("missing    multi_modal_projector.linear_2.bias"), "{error}");
        assert!(error.contains("unexpected vision_tower.vision_model.encoder.layers.2.mlp.fc1.bias"), "{error}");

        let model = model(&golden, "clip");
        let mut input = input(&golden, "clip", &model);
        input.pixel_values[1] = input.pixel_values[1].narrow(1, 0, 3);
        let error = model.forward(&input, 0).unwrap_err().to_string();
        assert_eq!(error, "a picture of 8 x 3 pixels is smaller than a patch of 4 x 4");
        let random = Llava::load(config("clip"), &Weights::random(0, Device::Cpu, Kind::Float)).unwrap();
        assert!(random.save(folder.path()).unwrap_err().to_string().contains("made in memory"));
        assert!(matches!(model.config().encoder().unwrap(), EncoderConfig::Clip(_)));
    }
}
