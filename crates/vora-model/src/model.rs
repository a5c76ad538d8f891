//! What training, evaluation and generation ask of a model that sees, whichever way it does.

use std::fmt::Debug;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tch::Tensor;
use vora_image::RgbImage;
use vora_llm::{AttentionPlan, CausalLm, Output, VisionAttention};
use vora_lora::{ActsOn, Linear, LoraConfig};
use vora_text::{Piece, Span, Spans};
use vora_torch::weights::Weights;
use vora_vision::Encoder;

use crate::adapted::AdaptedLlm;
use crate::few_bits::describe;
use crate::files::save_folder;

/// One batch, as the model takes it.
#[derive(Debug)]
#[non_exhaustive]
pub struct Input {
    /// `[batch, seq]`; what stands at image places is not read.
    pub input_ids: Tensor,
    /// The pictures in the order of their places in the batch, each `[3, height, width]`.
    pub pixel_values: Vec<Tensor>,
    /// Which tokens are text and which are pictures, row by row.
    pub spans: Spans,
}

/// A decoder with a way to see: pictures become embeddings, which stand among those of words.
pub trait VisionLanguageModel: Debug + Send {
    /// The decoder with its adapters.
    fn adapted(&self) -> &AdaptedLlm;

    /// The decoder with its adapters, to attach or merge some.
    fn adapted_mut(&mut self) -> &mut AdaptedLlm;

    /// The decoder.
    fn llm(&self) -> &CausalLm {
        self.adapted().llm()
    }

    /// The decoder, to change its linears one by one.
    fn llm_mut(&mut self) -> &mut CausalLm {
        self.adapted_mut().llm_mut()
    }

    /// Whether the tokens of a picture see each other in both directions.
    fn vision_attention(&self) -> VisionAttention;

    /// Whether it takes pictures at all.
    fn sees(&self) -> bool {
        true
    }

    /// Rows and columns of tokens that a picture of this size becomes.
    ///
    /// # Errors
    /// Where a picture of this size cannot be taken.
    fn image_grid(&self, height: i64, width: i64) -> Result<(i64, i64)>;

    /// Pictures of one size as the decoder takes them: `[n, 3, height, width]` -> `[n, tokens, hidden]`
    ///
    /// # Panics
    /// Where [`image_grid`](Self::image_grid) refuses the size; [`embed`](Self::embed) asks it first.
    fn image_features(&self, pixel_values: &Tensor) -> Tensor;

    /// Whether conversations come to it through a processor of Hugging Face's, which puts the first and last tokens of
    /// the tokenizer's post-processor around them; see [`Tokenizer::for_processor`](vora_text::Tokenizer::for_processor).
    fn has_processor(&self) -> bool {
        false
    }

    /// The tokens that begin and end every picture, for models that have some.
    fn image_marks(&self) -> Option<(i64, i64)> {
        None
    }

    /// The model as one that writes pictures as well; none for those that only see them.
    fn image_writer(&self) -> Option<&dyn ImageWriter> {
        None
    }

    /// The tensors of what it sees through that are not trained, for models that have some.
    fn encoder_tensors(&self) -> Vec<(String, Tensor)> {
        Vec::new()
    }

    /// The encoder, for models that see through one.
    fn encoder(&self) -> Option<&Encoder> {
        None
    }

    /// The adapters that are attached to the encoder; none once they are merged.
    fn vision_lora(&self) -> Option<&LoraConfig> {
        None
    }

    /// Visits every linear layer that may carry adapters, by its name in the model's folder.
    ///
    /// # Errors
    /// The first that `visit` returns.
    fn linears(&self, visit: &mut dyn FnMut(&str, &Linear) -> Result<()>) -> Result<()> {
        let prefix = self.llm_prefix();
        self.llm().linears(&mut |path, linear| visit(&format!("{prefix}{path}"), linear))
    }

    /// What the adapters' folder in PEFT's layout calls a tensor of this name in the model's folder, where it belongs to an
    /// adapter: its name in the model that PEFT puts them on. That is the LLM.
    fn peft_name(&self, name: &str) -> Option<String> {
        name.strip_prefix(self.llm_prefix()).map(str::to_owned)
    }

    /// Whether that model is the LLM alone, which PEFT opens as a causal language model; else it is the class of this one.
    fn adapts_llm_alone(&self) -> bool {
        self.vision_lora().is_none()
    }

    /// What `adapter_config.json` of that folder says; none where there are no adapters.
    ///
    /// # Errors
    /// That of a visit over the linears.
    fn peft_config(&self) -> Result<Option<LoraConfig>> {
        Ok(self.lora().cloned())
    }

    /// Takes every adapter off again.
    ///
    /// # Errors
    /// That of a visit over the linears.
    fn detach(&mut self) -> Result<()> {
        self.adapted_mut().detach()
    }

    /// The adapters that are attached; none once they are merged.
    fn lora(&self) -> Option<&LoraConfig> {
        self.adapted().lora()
    }

    /// Puts a named adapter on the linear layers that `lora` asks for; see [`AdaptedLlm::attach`].
    ///
    /// # Errors
    /// See [`attach_all`](vora_lora::attach_all).
    fn attach(&mut self, name: &str, lora: &LoraConfig, weights: &Weights) -> Result<()> {
        self.adapted_mut().attach(name, lora, weights)
    }

    /// Lets the adapters act on these tokens; see [`AdaptedLlm::set_acts_on`].
    ///
    /// # Errors
    /// Where there are none, and where they were not trained for that.
    fn set_acts_on(&mut self, acts_on: ActsOn) -> Result<()> {
        self.adapted_mut().set_acts_on(acts_on)
    }

    /// Folds every adapter into its layer's weight; see [`AdaptedLlm::merge`].
    ///
    /// # Errors
    /// Where an adapter holds a number that is not finite, by the name of its layer; nothing is merged then.
    fn merge(&mut self) -> Result<()> {
        self.adapted_mut().merge()
    }

    /// What stands before the decoder's own names in the model's folder: `llm.` in `llm.model.layers.0…`.
    fn llm_prefix(&self) -> &'static str;

    /// What `config.json` of the model's folder says.
    ///
    /// # Errors
    /// Where it cannot be said in JSON.
    fn config_json(&self) -> Result<Value>;

    /// Every tensor by its name in the model's folder. Adapters stand beside their weights, as far as the layout has a
    /// place for them.
    ///
    /// # Errors
    /// Where it has none, and adapters are still apart from the weights.
    fn tensors(&self) -> Result<Vec<(String, Tensor)>>;

    /// Writes a folder by which the model can be opened again: `config.json` and `model.safetensors`.
    ///
    /// # Errors
    /// As [`tensors`](Self::tensors), and where the folder cannot be written.
    fn save(&self, folder: &Path) -> Result<()> {
        save_folder(folder, &self.config_json()?, &self.tensors()?)
    }

    /// The decoder as an LLM that stands alone.
    ///
    /// # Errors
    /// Where adapters are still apart from the weights, or it has what no such LLM has.
    fn plain_llm(&self) -> Result<&CausalLm> {
        self.adapted().merged()
    }

    /// Writes the LLM alone as a plain checkpoint, without pictures, for any tool that reads one.
    ///
    /// # Errors
    /// As [`plain_llm`](Self::plain_llm), and where the folder cannot be written.
    fn save_llm(&self, folder: &Path) -> Result<()> {
        let llm = self.plain_llm()?;
        let mut config = serde_json::to_value(llm.config())?;
        describe(self.adapted(), &mut config);
        save_folder(folder, &config, &llm.stored()?)
    }

    /// The word embeddings with the pictures' tokens in their places, `[batch, seq, hidden]`.
    ///
    /// # Errors
    /// Where pictures and places differ in number, or a picture is none that the model can take.
    fn embed(&self, input: &Input) -> Result<Tensor> {
        let (batch, seq) = input.input_ids.size2()?;
        let places = input.spans.image_positions();
        if places.is_empty() {
            ensure!(input.pixel_values.is_empty(), "{} pictures and no place for one", input.pixel_values.len());
            return Ok(self.llm().embed(&input.input_ids));
        }
        ensure!(!input.pixel_values.is_empty(), "a place for a picture, and no picture");
        // Pictures of one size that follow each other go through together.
        let mut features = Vec::new();
        for group in input.pixel_values.chunk_by(|a, b| a.size() == b.size()) {
            let [3, height, width] = group[0].size()[..] else {
                bail!("a picture is {:?}, it must be [3, height, width]", group[0].size());
            };
            self.image_grid(height, width)?;
            features.push(self.image_features(&Tensor::stack(group, 0)).flatten(0, 1));
        }
        let features = Tensor::cat(&features, 0); // [image tokens, hidden]
        ensure!(
            features.size()[0] == places.len() as i64,
            "the pictures make {} tokens, the text has places for {}",
            features.size()[0],
            places.len()
        );
        let places = Tensor::from_slice(&places).to_device(input.input_ids.device());
        let ids = input.input_ids.view([-1]).index_fill(0, &places, 0);
        let words = self.llm().embed(&ids); // [batch * seq, hidden]
        Ok(words.index_copy(0, &places, &features).view([batch, seq, -1]))
    }

    /// How attention goes over these spans, and which of their tokens the adapters act on; made once a batch.
    ///
    /// # Errors
    /// See [`AttentionPlan::new`].
    fn plan(&self, spans: &Spans) -> Result<AttentionPlan> {
        let plan = AttentionPlan::new(spans, self.vision_attention(), self.llm().device(), self.llm().kind())?;
        Ok(plan.with_adapters(self.adapted().acts_on()))
    }

    /// Runs the decoder over a batch; keeps the hidden states of the first `hidden_layers` blocks.
    ///
    /// # Errors
    /// As [`embed`](Self::embed) and [`plan`](Self::plan).
    fn forward(&self, input: &Input, hidden_layers: usize) -> Result<Output> {
        let plan = self.plan(&input.spans)?;
        Ok(self.llm().decoder().forward(&self.embed(input)?, &plan, hidden_layers))
    }
}

/// A model to which pictures are tokens as words are: it reads them, and writes them one by one.
pub trait ImageWriter: VisionLanguageModel {
    /// The ids of all tokens that pictures are made of, sorted.
    fn image_vocabulary(&self) -> &[i64];

    /// The id of the token that begins a picture.
    fn begin_image_id(&self) -> i64;

    /// The id of the token that ends a picture.
    fn end_image_id(&self) -> i64;

    /// Rows and columns of the pictures that it was trained on, and draws.
    fn drawn_grid(&self) -> (i64, i64);

    /// The tokens of pictures of several sizes, one after the other, for a loss over what is written of both kinds: each
    /// `[3, height, width]` in [-1, 1], together `[tokens]`.
    ///
    /// # Errors
    /// Where a picture does not divide into tokens, or has not three channels.
    fn image_tokens(&self, pixel_values: &[Tensor]) -> Result<Tensor>;

    /// The pictures of image tokens that fill [`drawn_grid`](Self::drawn_grid), `[n, tokens]`.
    ///
    /// # Errors
    /// Where they do not, one is no image token, or the weights have nothing to draw with.
    fn draw(&self, image_token_ids: &Tensor) -> Result<Vec<RgbImage>>;
}

impl Input {
    /// A batch of these ids `[batch, seq]`, pictures and spans; see the fields. [`VisionLanguageModel::embed`] checks that
    /// they go together.
    pub fn new(input_ids: Tensor, pixel_values: Vec<Tensor>, spans: Spans) -> Self {
        Self { input_ids, pixel_values, spans }
    }

    /// One prompt: text and image places in order, with a picture `[3, height, width]` for each place, and around it
    /// the [`image_marks`](VisionLanguageModel::image_marks).
    ///
    /// # Errors
    /// Where pictures and places differ in number, or the model cannot take a picture's size.
    pub fn prompt(pieces: &[Piece], pixel_values: Vec<Tensor>, model: &dyn VisionLanguageModel) -> Result<Self> {
        let places = pieces.iter().filter(|piece| matches!(piece, Piece::Image)).count();
        ensure!(places == pixel_values.len(), "{} pictures for {places} image places", pixel_values.len());
        let mut pictures = pixel_values.iter();
        let (begin, end) = model.image_marks().unzip();
        let (mut ids, mut spans) = (Vec::new(), Vec::new());
        let add_text = |ids: &mut Vec<i64>, spans: &mut Vec<Span>, text: &[i64]| {
            ids.extend_from_slice(text);
            spans.extend((!text.is_empty()).then(|| Span::text(text.len() as i64)));
        };
        for piece in pieces {
            match piece {
                Piece::Text { ids: text, .. } => add_text(&mut ids, &mut spans, text),
                Piece::Image => {
                    let (_, height, width) = pictures.next().context("a place without a picture")?.size3()?;
                    let (rows, cols) = model.image_grid(height, width)?;
                    add_text(&mut ids, &mut spans, begin.as_slice());
                    ids.resize(ids.len() + (rows * cols) as usize, 0);
                    spans.push(Span::image(rows, cols));
                    add_text(&mut ids, &mut spans, end.as_slice());
                }
            }
        }
        let device = model.llm().device();
        let input_ids = Tensor::from_slice(&ids).unsqueeze(0).to_device(device);
        let pixel_values = pixel_values.into_iter().map(|p| p.to_device(device)).collect();
        Ok(Self::new(input_ids, pixel_values, Spans::new(vec![spans])))
    }

    /// Several of these as one, row after row; shorter rows are padded at their end.
    ///
    /// # Errors
    /// Where there are none, or they lie on several devices.
    pub fn concat(inputs: Vec<Self>) -> Result<Self> {
        let seq = inputs.iter().map(|input| input.spans.seq()).max().context("a batch of no prompts")?;
        let padded = |input: &Self| input.input_ids.f_constant_pad_nd([0, seq - input.spans.seq()]);
        let input_ids = Tensor::f_cat(&inputs.iter().map(padded).collect::<Result<Vec<_>, _>>()?, 0)?;
        let (pixel_values, rows): (Vec<_>, Vec<_>) =
            inputs.into_iter().map(|input| (input.pixel_values, input.spans.into_rows())).unzip();
        let spans = Spans::new(rows.into_iter().flatten().collect());
        Ok(Self::new(input_ids, pixel_values.into_iter().flatten().collect(), spans))
    }
}
