//! Gemma 4 Unified: a decoder whose pictures are patches that one matrix takes into the space of word embeddings.
//!
//! A folder is that of Hugging Face's `Gemma4UnifiedForConditionalGeneration`: `model.language_model`, `lm_head` where it
//! is not tied, `model.vision_embedder` and `model.embed_vision`.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tch::nn::Module;
use tch::{Device, Kind, Tensor};
use vora_llm::{CausalLm, VisionAttention};
use vora_lora::LoraConfig;
use vora_torch::weights::Weights;
use vora_vision::Gemma4VisionEmbedder;

use super::Gemma4UnifiedConfig;
use crate::adapted::{AdaptedLlm, under};
use crate::few_bits::describe;
use crate::files::dtype;
use crate::model::VisionLanguageModel;

/// A decoder, and the matrix that it sees through.
#[derive(Debug)]
pub struct Gemma4Unified {
    config: Gemma4UnifiedConfig, // but for `llm` and `lora`, which `llm` knows
    llm: AdaptedLlm,
    vision_embedder: Gemma4VisionEmbedder,
}

impl Gemma4Unified {
    /// Takes everything from one source, under the names of a checkpoint.
    ///
    /// # Errors
    /// Where a config contradicts itself; tensors that do not fit are told by [`Weights::finish`].
    pub fn load(config: Gemma4UnifiedConfig, weights: &Weights) -> Result<Self> {
        Self::assemble(config, weights, weights, weights)
    }

    /// Takes the decoder, what it sees through and the adapters that the config names from a source each. A decoder that is
    /// frozen and an embedder that learns are one source and the same [`Weights::trained`].
    ///
    /// # Errors
    /// As [`Gemma4Unified::load`], and where the decoder has no layers for such adapters.
    pub fn assemble(
        mut config: Gemma4UnifiedConfig,
        llm: &Weights,
        vision: &Weights,
        adapters: &Weights,
    ) -> Result<Self> {
        // The decoder's own names, by which it is known here.
        for stored in llm.names() {
            if let Some(in_decoder) = stored.strip_prefix("model.language_model.") {
                llm.alias(&format!("{PREFIX}model.{in_decoder}"), &stored);
            } else if stored == "lm_head.weight" {
                llm.alias(&format!("{PREFIX}{stored}"), &stored);
            }
        }
        let (lora, hidden_size) = (config.lora.take(), config.llm.hidden_size);
        let mut decoder = CausalLm::load(&config.llm, &llm.pp("language_model"))?;
        let (placeholders, padding) = config.placeholders();
        decoder.embed_as(&placeholders, padding);
        let mut model = Self {
            llm: AdaptedLlm::new(decoder),
            vision_embedder: Gemma4VisionEmbedder::load(&config.vision, hidden_size, &vision.pp("model"))?,
            config,
        };
        if let Some(lora) = lora {
            model.attach(ADAPTER, &lora, &adapters.pp("language_model"))?;
        }
        Ok(model)
    }

    /// Opens a folder of Hugging Face's, or one that [`Gemma4Unified::save`](VisionLanguageModel::save) wrote. The weights of
    /// an audio embedder are left where they are.
    ///
    /// # Errors
    /// Names the file, and what in it does not fit.
    pub fn open(folder: &Path, device: Device, kind: Kind) -> Result<Self> {
        let config = Gemma4UnifiedConfig::open(folder)?;
        let weights = Weights::open(folder, device, kind)?;
        let model = Self::load(config, &weights).with_context(|| format!("in {}", folder.display()))?;
        weights
            .finish_allowing(|name| name.starts_with("model.embed_audio."))
            .with_context(|| format!("loading {}", folder.display()))?;
        Ok(model)
    }

    /// Opens a folder to teach it: adapters on its decoder that start as `new` has them, and the embedder frozen or, as an f32
    /// parameter of `new` as well, trained from what it is. What a run then leaves names the folder as `name`.
    ///
    /// # Errors
    /// As [`Gemma4Unified::open`], and where the decoder has no layers for such adapters.
    pub fn open_to_teach(
        folder: &Path,
        name: &str,
        lora: Option<&LoraConfig>,
        trains_embedder: bool,
        new: &Weights,
    ) -> Result<Self> {
        let base = Weights::open(folder, new.device(), new.kind())?;
        let config = Gemma4UnifiedConfig::open(folder)?;
        Self::teach(config, &base, name, lora, trains_embedder, new)
            .with_context(|| format!("loading {}", folder.display()))
    }

    /// The same over a `base` that is open already, or has shapes alone ([`Weights::shapes`]) for a model that is counted.
    ///
    /// # Errors
    /// As [`Gemma4Unified::open_to_teach`].
    pub fn teach(
        mut config: Gemma4UnifiedConfig,
        base: &Weights,
        name: &str,
        lora: Option<&LoraConfig>,
        trains_embedder: bool,
        new: &Weights,
    ) -> Result<Self> {
        config.llm_name = name.to_owned();
        config.lora = lora.map(|lora| lora.over(config.llm.num_hidden_layers));
        let model = Self::open_part(config, base, trains_embedder, new)?;
        let starts = trains_embedder && base.has_numbers();
        for (name, tensor) in model.vision_embedder.tensors().into_iter().filter(|_| starts) {
            let name = format!("model.{name}");
            let before = base.stored_tensor(&name)?.with_context(|| format!("there is no {name}"))?;
            tch::no_grad(|| tensor.shallow_clone().f_copy_(&before)).with_context(|| name)?;
        }
        Ok(model)
    }

    /// Opens what was trained of one that lies in `base`: adapters and, where they were trained, the weights of the embedder,
    /// all of which start as `new` has them.
    ///
    /// # Errors
    /// As [`Gemma4Unified::assemble`], and where tensors do not fit.
    pub(crate) fn open_part(
        config: Gemma4UnifiedConfig,
        base: &Weights,
        trains_embedder: bool,
        new: &Weights,
    ) -> Result<Self> {
        let model = match trains_embedder {
            true => Self::assemble(config, base, &new.trained(), new)?,
            false => Self::assemble(config, base, base, new)?,
        };
        let others = ["model.embed_audio.", "model.vision_embedder.", "model.embed_vision."];
        base.finish_allowing(|name| others.iter().any(|other| name.starts_with(other)))?;
        Ok(model)
    }

    /// What it is made of.
    pub fn config(&self) -> Gemma4UnifiedConfig {
        let mut config = self.config.clone();
        config.llm = self.llm().config().clone(); // which knows whether the head is tied
        config.lora = self.lora().cloned();
        config
    }

    /// What it sees through.
    pub fn vision_embedder(&self) -> &Gemma4VisionEmbedder {
        &self.vision_embedder
    }
}

/// The name of the adapters.
const ADAPTER: &str = "default";

/// What stands before the decoder's own names here.
const PREFIX: &str = "language_model.";

/// A name of the decoder's own, as it is in a checkpoint.
fn stored_name(own: &str) -> String {
    match own.strip_prefix("model.") {
        Some(in_decoder) => format!("model.language_model.{in_decoder}"),
        None => own.to_owned(),
    }
}

impl VisionLanguageModel for Gemma4Unified {
    fn adapted(&self) -> &AdaptedLlm {
        &self.llm
    }

    fn adapted_mut(&mut self) -> &mut AdaptedLlm {
        &mut self.llm
    }

    fn vision_attention(&self) -> VisionAttention {
        self.config.vision_attention()
    }

    /// `Gemma4UnifiedProcessor`.
    fn has_processor(&self) -> bool {
        true
    }

    /// `boi_token_id` and `eoi_token_id`, which the processor writes around every picture.
    fn image_marks(&self) -> Option<(i64, i64)> {
        Some((self.config.boi_token_id, self.config.eoi_token_id))
    }

    /// # Errors
    /// See [`Gemma4VisionEmbedder::grid`].
    fn image_grid(&self, height: i64, width: i64) -> Result<(i64, i64)> {
        self.vision_embedder.grid(height, width)
    }

    fn image_features(&self, pixel_values: &Tensor) -> Tensor {
        self.vision_embedder.forward(pixel_values)
    }

    fn encoder_tensors(&self) -> Vec<(String, Tensor)> {
        let is_frozen = |(_, tensor): &(String, Tensor)| !tensor.requires_grad();
        under("model.", self.vision_embedder.tensors().into_iter().filter(is_frozen))
    }

    /// Adapters are those of Hugging Face's `Gemma4UnifiedForConditionalGeneration`.
    fn peft_name(&self, name: &str) -> Option<String> {
        name.strip_prefix(PREFIX).map(stored_name)
    }

    fn adapts_llm_alone(&self) -> bool {
        false
    }

    fn llm_prefix(&self) -> &'static str {
        PREFIX
    }

    fn config_json(&self) -> Result<Value> {
        let mut json = self.config().to_json()?;
        json["dtype"] = json!(dtype(self.llm().kind()));
        describe(&self.llm, &mut json);
        Ok(json)
    }

    /// Hugging Face's layout.
    ///
    /// # Errors
    /// Where adapters are still apart from the weights.
    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let llm = self.llm.merged()?.stored()?.into_iter();
        let mut tensors: Vec<_> = llm.map(|(name, tensor)| (stored_name(&name), tensor)).collect();
        tensors.extend(under("model.", self.vision_embedder.tensors()));
        Ok(tensors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fixtures::{Golden, assert_close_to};
    use vora_text::{Span, Spans};

    use crate::model::Input;

    fn tiny() -> std::path::PathBuf {
        fixtures::root().join("tiny/gemma4")
    }

    fn model(kind: Kind) -> Gemma4Unified {
        Gemma4Unified::open(&tiny(), Device::Cpu, kind).unwrap()
    }

    /// The rows of a case: words, and pictures between their marks.
    fn rows(case: &str) -> Vec<Vec<Span>> {
        let one = vec![Span::text(4), Span::image(3, 5), Span::text(5)];
        let two = [Span::text(3), Span::image(4, 2), Span::text(3), Span::image(3, 5), Span::text(4)].to_vec();
        match case {
            "text" => vec![vec![Span::text(11)]],
            "one" | "causal" => vec![one],
            "two" => vec![two],
            _ => vec![vec![Span::text(11)], one, two],
        }
    }

    fn input(golden: &Golden, case: &str) -> Input {
        let rows = rows(case);
        let pictures = rows.iter().flatten().filter(|span| span.is_image()).count();
        let pixel_values = (0..pictures).map(|i| golden[&format!("{case}.pixel_values.{i}")].shallow_clone()).collect();
        Input::new(golden[&format!("{case}.input_ids")].shallow_clone(), pixel_values, Spans::new(rows))
    }

    #[test]
    fn hidden_states_and_logits_match_reference() {
        let golden = fixtures::open("gemma4_unified");
        let mut model = model(Kind::Float);
        for case in ["text", "one", "two", "batch", "causal"] {
            if case == "causal" {
                let all = &mut model.config.llm.extra;
                all.insert("use_bidirectional_attention".into(), Value::Null);
            }
            let input = input(&golden, case);
            let output = tch::no_grad(|| model.forward(&input, 3)).unwrap();
            for (row, len) in (0..).zip(input.spans.row_lens()) {
                for (i, hidden) in output.hidden_states.iter().enumerate() {
                    let of_row = |t: &Tensor| t.get(row).narrow(0, 0, len);
                    assert_close_to(&of_row(hidden), &of_row(&golden[&format!("{case}.hidden_states.{i}")]), 2e-5);
                }
                let expected = golden[&format!("{case}.logits")].get(row); // [kept, vocab]
                let kept = expected.size()[0];
                let last = output.last_hidden_state.get(row).narrow(0, len - kept, kept);
                assert_close_to(&model.llm().logits(&last), &expected, 2e-5);
            }
        }
    }

    /// Alone, and side by side with rows of other lengths.
    #[test]
    fn decoding_step_by_step_matches_reference() {
        let golden = fixtures::open("gemma4_unified");
        let model = model(Kind::Float);
        for (cases, case) in [(&["one"][..], "one"), (&["two"], "two"), (&["text", "one", "two"], "batch")] {
            let input = input(&golden, case);
            let mut cache = model.llm().new_cache(input.spans.batch(), input.spans.seq() + 4).unwrap();
            let (embeds, plan) = (model.embed(&input).unwrap(), model.plan(&input.spans).unwrap());
            let mut steps = vec![model.llm().prefill(&embeds, &plan, &mut cache).unwrap()];
            for step in 0..4 {
                let ids = golden["continuation"].narrow(0, step, 1).expand([input.spans.batch(), 1], false);
                steps.push(model.llm().decode_step(&ids, &mut cache).unwrap());
            }
            let steps = Tensor::stack(&steps, 1); // [batch, steps, vocab]
            for (row, case) in (0..).zip(cases).filter(|(_, case)| **case != "text") {
                assert_close_to(&steps.get(row), &golden[&format!("{case}.steps")], 2e-5);
            }
        }
    }

    #[test]
    fn a_saved_folder_has_the_names_of_hf_and_opens_again() {
        let golden = fixtures::open("gemma4_unified");
        let folder = tempfile::tempdir().unwrap();
        for kind in [Kind::Float, Kind::BFloat16] {
            let model = model(kind);
            model.save(folder.path()).unwrap();
            let [stored, again] = [tiny().as_path(), folder.path()]
                .map(|folder| Weights::open(folder, Device::Cpu, kind).unwrap().names());
            assert_eq!(again, stored);
            let again = Gemma4Unified::open(folder.path(), Device::Cpu, kind).unwrap();
            assert_eq!(again.config_json().unwrap(), model.config_json().unwrap());
            let input = input(&golden, "two");
            let [before, after] = [&model, &again].map(|model| model.forward(&input, 0).unwrap().last_hidden_state);
            assert!(before.equal(&after) && before.kind() == kind);
        }
    }

    #[test]
    fn a_place_without_a_picture_is_padding() {
        let model = model(Kind::Float);
        let embed = |id: i64| model.llm().embed(&Tensor::from_slice(&[id]));
        let (placeholders, padding) = model.config().placeholders();
        assert_eq!((placeholders, padding), ([512, 520, 515], 0));
        assert!(placeholders.iter().all(|&id| embed(id).equal(&embed(0))));
        assert!(!embed(513).equal(&embed(0)));
    }

    #[test]
    fn weights_of_an_audio_embedder_are_left_alone_and_others_told() {
        let load = |name: &str| {
            let folder = tempfile::tempdir().unwrap();
            let model = model(Kind::Float);
            let mut tensors = model.tensors().unwrap();
            tensors.push((name.to_owned(), Tensor::zeros([2, 2], (Kind::Float, Device::Cpu))));
            crate::files::save_folder(folder.path(), &model.config_json().unwrap(), &tensors).unwrap();
            Gemma4Unified::open(folder.path(), Device::Cpu, Kind::Float).map(drop)
        };
        load("model.embed_audio.embedding_projection.weight").unwrap();
        let error = format!("{:#}", load("model.vision_tower.x").unwrap_err());
        assert!(error.contains("unexpected model.vision_tower.x"), "{error}");
    }
}
