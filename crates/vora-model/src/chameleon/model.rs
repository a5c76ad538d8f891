//! Chameleon (arXiv 2405.09818): pictures are tokens of one vocabulary with the words, read and written by one decoder.
//!
//! A folder is that of Hugging Face's `ChameleonForConditionalGeneration`: `config.json` with the decoder's keys flat,
//! `vq_config` and `vocabulary_map` among them; `model.embed_tokens`, `model.layers`, `model.norm`, `lm_head`, and the
//! image tokenizer under `model.vqmodel`. Published folders of Hugging Face's have no `model.vqmodel.decoder`: such a model
//! sees and writes image tokens, but nobody sees its pictures. With it, under the names of the public VQGAN, it draws.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};
use vora_image::RgbImage;
use vora_llm::{CausalLm, LlmConfig, VisionAttention};
use vora_torch::weights::Weights;
use vora_vision::{VqConfig, VqModel, to_images};

use super::vocabulary::{VocabularyMapping, image_token_name};
use crate::adapted::{AdaptedLlm, under};
use crate::few_bits::describe;
use crate::model::{ImageWriter, VisionLanguageModel};

/// The name of the token before a picture (Hugging Face's `image_start_token`).
const BEGIN_IMAGE: &str = "<racm3:break>";
/// The name of the token after a picture (Hugging Face's `image_end_token`).
const END_IMAGE: &str = "<eoss>";
/// The name of the token that holds a picture's places in a prompt (Hugging Face's `image_token`).
const IMAGE: &str = "<image>";

/// Where the image tokenizer lies in a Chameleon's files.
pub const VQMODEL: &str = "model.vqmodel";

/// A decoder over words and image codes, and the image tokenizer.
#[derive(Debug)]
pub struct Chameleon {
    llm: AdaptedLlm,
    vqmodel: VqModel,
    vocabulary: VocabularyMapping,
    begin_image_id: i64,
    end_image_id: i64,
}

impl Chameleon {
    /// Takes `model.*` and `lm_head` from one source.
    ///
    /// # Errors
    /// Names the key of `config` that is missing or does not fit the others; tensors that do not fit are told by
    /// [`Weights::finish`].
    pub fn load(config: &LlmConfig, weights: &Weights) -> Result<Self> {
        Self::assemble(config, weights, &weights.pp(VQMODEL))
    }

    /// The config of a Chameleon that starts from a Llama-like LLM: after its vocabulary a token for each code of
    /// the image tokenizer, then the two around a picture and `<image>`. Without the norm of queries and keys, with which
    /// the LLM was not trained.
    ///
    /// # Errors
    /// Where the LLM has what a Chameleon's decoder has not, by the key.
    pub fn config_over(llm: &LlmConfig, vq: &VqConfig) -> Result<LlmConfig> {
        let codes = u32::try_from(vq.num_embeddings).context("vq_config.num_embeddings")?;
        let names = (0..codes).map(image_token_name).chain([BEGIN_IMAGE, END_IMAGE, IMAGE].map(str::to_owned));
        let map: Map<String, Value> = names.zip(llm.vocab_size..).map(|(name, id)| (name, id.into())).collect();
        let mut config = llm.clone();
        config.model_type = "chameleon".to_owned();
        config.vocab_size += map.len() as i64;
        config.qk_norm = Some(false);
        config.extra.insert("architectures".into(), json!(["ChameleonForConditionalGeneration"]));
        config.extra.insert("vq_config".into(), serde_json::to_value(vq)?);
        config.extra.insert("vocabulary_map".into(), Value::Object(map));
        config.validate()?;
        Ok(config)
    }

    /// The tokens before and after each picture, `<racm3:break>` and `<eoss>`, as a folder's config has them.
    ///
    /// # Errors
    /// Where `vocabulary_map` lacks one.
    pub fn image_marks_of(config: &LlmConfig) -> Result<(i64, i64)> {
        let map = vocabulary_map(config)?;
        Ok((token_id(map, BEGIN_IMAGE)?, token_id(map, END_IMAGE)?))
    }

    /// As [`Chameleon::load`], with `model.*` and `lm_head` from one source and the image tokenizer, from its root, from
    /// another.
    ///
    /// # Errors
    /// As [`Chameleon::load`].
    pub fn assemble(config: &LlmConfig, llm: &Weights, vqmodel: &Weights) -> Result<Self> {
        let model_type = &config.model_type;
        ensure!(model_type == "chameleon", "model_type is `{model_type}`, a Chameleon folder says `chameleon`");
        let vq_config = match config.extra.get("vq_config") {
            None | Some(Value::Null) => VqConfig::default(),
            Some(keys) => serde_json::from_value(keys.clone()).context("in vq_config")?,
        };
        ensure!(vq_config.in_channels == 3, "vq_config.in_channels is {}, pictures have 3", vq_config.in_channels);
        let vocabulary = VocabularyMapping::new(vocabulary_map(config)?)?;
        let (tokens, codes) = (vocabulary.image_token_ids().len(), vq_config.num_embeddings);
        ensure!(
            tokens as i64 == codes,
            "vocabulary_map has {tokens} image tokens, vq_config.num_embeddings is {codes}"
        );
        let (begin_image_id, end_image_id) = Self::image_marks_of(config)?;
        let ids = vocabulary.image_token_ids().iter().copied();
        let largest = ids.chain([begin_image_id, end_image_id, vocabulary.image_token_id()]).max().unwrap_or_default();
        ensure!(
            largest < config.vocab_size,
            "vocabulary_map has the id {largest}, vocab_size is {}",
            config.vocab_size
        );
        Ok(Self {
            llm: AdaptedLlm::new(CausalLm::load(config, llm)?),
            vqmodel: VqModel::load(&vq_config, vqmodel).context("in vq_config")?,
            vocabulary,
            begin_image_id,
            end_image_id,
        })
    }

    /// Opens a folder, a published one or one that [`Chameleon::save`](VisionLanguageModel::save) wrote. The image
    /// tokenizer is of the same `kind` as the decoder, as Hugging Face has it: in bf16 a few codes may differ from f32's.
    ///
    /// # Errors
    /// As [`Chameleon::load`], and where a file cannot be read or its tensors do not fit.
    pub fn open(folder: &Path, device: Device, kind: Kind) -> Result<Self> {
        let config = LlmConfig::open(folder)?;
        let weights = Weights::open(folder, device, kind)?;
        let model = Self::load(&config, &weights).with_context(|| format!("in {}", folder.display()))?;
        weights.finish()?;
        Ok(model)
    }

    /// The image tokenizer.
    pub fn vqmodel(&self) -> &VqModel {
        &self.vqmodel
    }

    /// Which token stands for which image code.
    pub fn vocabulary(&self) -> &VocabularyMapping {
        &self.vocabulary
    }

    /// The tokens of pictures, row by row, for a loss over what the model writes of both kinds:
    /// `[n, 3, height, width]` in [-1, 1] -> `[n, tokens]` (Hugging Face's `get_image_tokens`).
    ///
    /// # Errors
    /// Where the pictures do not divide into codes, or have not three channels.
    pub fn image_token_ids(&self, pixel_values: &Tensor) -> Result<Tensor> {
        self.vocabulary.img2bpe(&self.vqmodel.encode(pixel_values)?)
    }
}

impl VisionLanguageModel for Chameleon {
    fn adapted(&self) -> &AdaptedLlm {
        &self.llm
    }

    fn adapted_mut(&mut self) -> &mut AdaptedLlm {
        &mut self.llm
    }

    /// A picture's tokens are written one by one, and read as they are written.
    fn vision_attention(&self) -> VisionAttention {
        VisionAttention::Causal
    }

    /// # Errors
    /// Where a side is not a positive multiple of [`VqConfig::stride`].
    fn image_grid(&self, height: i64, width: i64) -> Result<(i64, i64)> {
        self.vqmodel.grid(height, width)
    }

    /// The embeddings of [`Chameleon::image_token_ids`].
    ///
    /// # Panics
    /// Where the pictures have not three channels, or a size that [`Chameleon::image_grid`] refuses.
    fn image_features(&self, pixel_values: &Tensor) -> Tensor {
        let ids = self.image_token_ids(pixel_values).expect("pictures are [n, 3, height, width] and have a grid");
        self.llm().embed(&ids)
    }

    /// `ChameleonProcessor`.
    fn has_processor(&self) -> bool {
        true
    }

    /// `<racm3:break>` and `<eoss>`, as Hugging Face's `ChameleonProcessor` writes them.
    fn image_marks(&self) -> Option<(i64, i64)> {
        Some((self.begin_image_id, self.end_image_id))
    }

    fn image_writer(&self) -> Option<&dyn ImageWriter> {
        Some(self)
    }

    fn llm_prefix(&self) -> &'static str {
        ""
    }

    fn config_json(&self) -> Result<Value> {
        let mut json = serde_json::to_value(self.llm().config())?;
        describe(&self.llm, &mut json);
        Ok(json)
    }

    /// Hugging Face's layout.
    ///
    /// # Errors
    /// Where adapters are still apart from the weights.
    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = self.llm.merged()?.stored()?;
        tensors.extend(under("model.vqmodel.", self.vqmodel.tensors()));
        Ok(tensors)
    }
}

impl ImageWriter for Chameleon {
    fn image_vocabulary(&self) -> &[i64] {
        self.vocabulary.image_token_ids()
    }

    /// `<racm3:break>`.
    fn begin_image_id(&self) -> i64 {
        self.begin_image_id
    }

    /// `<eoss>`.
    fn end_image_id(&self) -> i64 {
        self.end_image_id
    }

    /// 32 and 32 in Chameleon's own.
    fn drawn_grid(&self) -> (i64, i64) {
        let side = self.vqmodel.config().resolution / self.vqmodel.config().stride();
        (side, side)
    }

    /// Pictures of one size that follow each other go through the image tokenizer together.
    fn image_tokens(&self, pixel_values: &[Tensor]) -> Result<Tensor> {
        let groups = pixel_values.chunk_by(|a, b| a.size() == b.size());
        let tokens = groups.map(|group| Ok(self.image_token_ids(&Tensor::stack(group, 0))?.flatten(0, 1)));
        Ok(Tensor::f_cat(&tokens.collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// # Errors
    /// Where the tokens do not fill the grid, one is no image token, or the weights have no `model.vqmodel.decoder`.
    fn draw(&self, image_token_ids: &Tensor) -> Result<Vec<RgbImage>> {
        let codes = self.vocabulary.bpe2img(&image_token_ids.contiguous())?;
        to_images(&self.vqmodel.decode(&codes, self.drawn_grid())?)
    }
}

fn vocabulary_map(config: &LlmConfig) -> Result<&Map<String, Value>> {
    let map = config.extra.get("vocabulary_map").and_then(Value::as_object);
    map.context("config.json has no object `vocabulary_map`, which names the image tokens")
}

/// The id of a token that a Chameleon cannot do without.
fn token_id(vocabulary_map: &Map<String, Value>, name: &str) -> Result<i64> {
    let value = vocabulary_map.get(name).with_context(|| format!("vocabulary_map has no token `{name}`"))?;
    value
        .as_i64()
        .filter(|id| *id >= 0)
        .with_context(|| format!("token `{name}` of vocabulary_map has the id {value}, ids are whole numbers"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use fixtures::Golden;
    use vora_lora::LoraConfig;
    use vora_text::{Piece, Span, Spans};
    use vora_torch::checkpoint::save;

    use crate::files::save_folder;
    use crate::model::Input;

    fn config(name: &str) -> LlmConfig {
        let text = std::fs::read(fixtures::root().join("golden/chameleon.json")).unwrap();
        serde_json::from_value(serde_json::from_slice::<Value>(&text).unwrap()[name].take()).unwrap()
    }

    fn model(golden: &Golden, name: &str) -> Chameleon {
        let weights = Weights::from_tensors(golden.under("weights."), Device::Cpu, Kind::Float);
        let model = Chameleon::load(&config(name), &weights).unwrap();
        weights.finish().unwrap();
        model
    }

    /// The rows that the golden file was made from: words, a begin, a picture, an end, words.
    fn input(golden: &Golden) -> Input {
        let spans = |before| vec![Span::text(before), Span::image(4, 4), Span::text(26 - before - 16)];
        Input::new(
            golden["input_ids"].shallow_clone(),
            golden["pixel_values"].unbind(0),
            Spans::new(vec![spans(4), spans(2)]),
        )
    }

    #[test]
    fn matches_reference() {
        let golden = fixtures::open("chameleon");
        for name in ["pre", "swin"] {
            let model = model(&golden, name);
            let ids = model.image_token_ids(&golden["pixel_values"]).unwrap();
            assert!(ids.equal(&golden[&format!("{name}.image_tokens")]), "{name}: tokens differ");
            let output = tch::no_grad(|| model.forward(&input(&golden), 0)).unwrap();
            let logits = model.llm().logits(&output.last_hidden_state);
            fixtures::assert_close_to(&logits, &golden[&format!("{name}.logits")], 1e-5);
        }
    }

    #[test]
    fn pieces_become_the_references_prompt() {
        let golden = fixtures::open("chameleon");
        let model = model(&golden, "pre");
        let expected = Vec::<i64>::try_from(golden["input_ids"].get(0)).unwrap();
        let text = |ids: &[i64]| Piece::Text { ids: ids.to_vec(), supervised: false };
        let pieces = [text(&expected[..3]), Piece::Image, text(&expected[21..])];
        let input = Input::prompt(&pieces, vec![golden["pixel_values"].get(0)], &model).unwrap();
        let places = Tensor::from_slice(&input.spans.image_positions());
        let placed = input.input_ids.view([-1]).index_fill(0, &places, model.vocabulary().image_token_id());
        assert_eq!(Vec::<i64>::try_from(placed).unwrap(), expected);
        assert_eq!((model.begin_image_id(), model.end_image_id()), (expected[3], expected[20]));
        assert!(Input::prompt(&pieces, vec![golden["pixel_values"].get(0).narrow(1, 0, 7)], &model).is_err());
    }

    #[test]
    fn a_folder_there_and_back_changes_no_byte_of_a_tensor() {
        let golden = fixtures::open("chameleon");
        let root = tempfile::tempdir().unwrap();
        let (there, back) = (root.path().join("there"), root.path().join("back"));
        let json = serde_json::to_value(config("swin")).unwrap();
        save_folder(&there, &json, &golden.under("weights.")).unwrap();
        Chameleon::open(&there, Device::Cpu, Kind::BFloat16).unwrap().save(&back).unwrap();

        let read = |folder: &Path| -> BTreeMap<String, Tensor> {
            Tensor::read_safetensors(folder.join("model.safetensors")).unwrap().into_iter().collect()
        };
        let (before, after) = (read(&there), read(&back));
        assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
        for (name, tensor) in &before {
            assert_eq!((tensor.kind(), tensor.size()), (after[name].kind(), after[name].size()), "{name}");
            // As integers: bits that are no number differ too.
            assert!(tensor.view_dtype(Kind::Int16).equal(&after[name].view_dtype(Kind::Int16)), "{name}");
        }
        assert_eq!(LlmConfig::open(&back).unwrap(), config("swin"));
    }

    #[test]
    fn one_over_an_llm_has_its_vocabulary_and_the_pictures_behind_it() {
        let llm = LlmConfig::tiny(64);
        let config = Chameleon::config_over(&llm, &VqConfig::tiny()).unwrap();
        assert_eq!(config.vocab_size, 64 + 32 + 3);
        let model = Chameleon::load(&config, &Weights::random(0, Device::Cpu, Kind::Float)).unwrap();
        assert_eq!(model.vocabulary().image_token_ids(), (64..96).collect::<Vec<_>>());
        assert_eq!((model.image_marks(), model.vocabulary().image_token_id()), (Some((96, 97)), 98));
        assert!(model.image_writer().is_some());
        let error = Chameleon::config_over(&LlmConfig { qk_norm: None, head_dim: Some(6), ..llm }, &VqConfig::tiny());
        assert!(error.unwrap_err().to_string().contains("head_dim is 6"));
    }

    #[test]
    fn with_a_decoder_it_draws_and_is_saved_whole() {
        let weights = Weights::random(4, Device::Cpu, Kind::Float);
        let model = Chameleon::load(&config("pre"), &weights).unwrap();
        let ids = model.image_token_ids(&fixtures::open("chameleon")["pixel_values"]).unwrap(); // [2, 16]
        assert_eq!(ids.size()[1], model.drawn_grid().0 * model.drawn_grid().1);
        let pictures = model.draw(&ids).unwrap();
        assert_eq!((pictures.len(), pictures[0].dimensions()), (2, (8, 8)));
        let folder = tempfile::tempdir().unwrap();
        model.save(folder.path()).unwrap();
        let again = Chameleon::open(folder.path(), Device::Cpu, Kind::Float).unwrap();
        assert!(again.vqmodel().has_decoder());
        assert_eq!(again.draw(&ids).unwrap(), pictures);
        let error = model.draw(&ids.narrow(1, 0, 15)).unwrap_err().to_string();
        assert!(error.contains("a grid of 4 rows and 4 columns"), "{error}");
        let error = model.draw(&ids.full_like(model.end_image_id())).unwrap_err().to_string();
        assert!(error.contains("is not an image token"), "{error}");
    }

    #[test]
    fn adapters_are_merged_before_it_is_saved() {
        let golden = fixtures::open("chameleon");
        let mut model = model(&golden, "pre");
        let weights = Weights::random(1, Device::Cpu, Kind::Float);
        model.attach("default", &LoraConfig::new(2, 1), &weights).unwrap();
        assert_eq!(model.lora(), Some(&LoraConfig::new(2, 1)));
        let folder = tempfile::tempdir().unwrap();
        assert!(model.save(folder.path()).unwrap_err().to_string().contains("merge first"));
        model.merge().unwrap();
        assert_eq!(model.lora(), None);
        model.save(folder.path()).unwrap();
        Chameleon::open(folder.path(), Device::Cpu, Kind::Float).unwrap();
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let refuse = |change: &dyn Fn(&mut LlmConfig)| {
            let mut config = config("pre");
            change(&mut config);
            format!("{:#}", Chameleon::load(&config, &Weights::random(0, Device::Cpu, Kind::Float)).unwrap_err())
        };
        let without = |name: &'static str| {
            move |config: &mut LlmConfig| drop(config.extra["vocabulary_map"].as_object_mut().unwrap().remove(name))
        };
        let error = refuse(&|config| config.model_type = "llama".into());
        assert_eq!(error, "model_type is `llama`, a Chameleon folder says `chameleon`");
        assert!(refuse(&|config| drop(config.extra.remove("vocabulary_map"))).contains("no object `vocabulary_map`"));
        assert_eq!(refuse(&without(BEGIN_IMAGE)), "vocabulary_map has no token `<racm3:break>`");
        assert_eq!(refuse(&without(END_IMAGE)), "vocabulary_map has no token `<eoss>`");
        let error = refuse(&|config| config.extra["vocabulary_map"][END_IMAGE] = json!(-7));
        assert_eq!(error, "token `<eoss>` of vocabulary_map has the id -7, ids are whole numbers");
        let error = refuse(&|config| config.extra["vq_config"]["num_embeddings"] = json!(25));
        assert_eq!(error, "vocabulary_map has 24 image tokens, vq_config.num_embeddings is 25");
        let error = refuse(&|config| drop(config.extra.remove("vq_config")));
        assert_eq!(error, "vocabulary_map has 24 image tokens, vq_config.num_embeddings is 8192");
        assert!(refuse(&|config| config.vocab_size = 40).contains("vocab_size is 40"));
        assert!(refuse(&|config| config.extra["vq_config"]["in_channels"] = json!(1)).contains("in_channels is 1"));
        assert!(refuse(&|config| config.extra["vq_config"]["base_channels"] = json!(48)).contains("in vq_config: "));

        let golden = fixtures::open("chameleon");
        let folder = tempfile::tempdir().unwrap();
        let mut tensors = golden.under("weights.");
        tensors.retain(|(name, _)| name != "model.vqmodel.quant_conv.bias");
        tensors.push(("model.vqmodel.loss.logvar".into(), Tensor::from_slice(&[0f32])));
        save_folder(folder.path(), &serde_json::to_value(config("pre")).unwrap(), &[]).unwrap();
        save(&folder.path().join("model.safetensors"), &tensors, &[]).unwrap();
        let error = Chameleon::open(folder.path(), Device::Cpu, Kind::Float).unwrap_err().to_string();
        assert!(error.contains("missing    model.vqmodel.quant_conv.bias"), "{error}");
        assert!(error.contains("unexpected model.vqmodel.loss.logvar"), "{error}");
    }
}
