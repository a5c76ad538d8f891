//! The model in training: its losses, its trained tensors, what evaluation asks of it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};
use vora_data::Preparation;
use vora_llm::{AttentionPlan, Decoder, DropoutSeed, Pass};
use vora_model::VisionLanguageModel;
use vora_recipe::TrainConfig;
use vora_torch::nn::attention::has_attention;
use vora_torch::nn::loss::cross_entropy_and_z_loss;
use vora_torch::weights::Weights;

use crate::batch::DeviceBatch;
use crate::distill::Distill;
use crate::logits::logits_chunk;
use crate::pictures::Pictures;
use crate::preference::{Reference, Rewards};
use crate::preparation::preparation_over;
use crate::teacher::Teacher;

/// The losses of one forward pass, f32 scalars.
#[derive(Debug)]
#[non_exhaustive]
pub struct Losses {
    /// Cross-entropy, and z-loss where the run has it, summed over [`Student::num_targets`] tokens; where the run learns
    /// from preferences DPO's loss, summed over as many pairs.
    pub lm_sum: Tensor,
    /// The rewards of the pairs.
    pub rewards: Option<Rewards>,
    /// Cosine loss, mean over blocks and image tokens; none without a teacher or a picture.
    pub distill: Option<Tensor>,
    /// `[blocks]`: the cosine loss of each, without a graph.
    pub distill_blocks: Option<Tensor>,
}

/// The model in training.
#[derive(Debug)]
pub struct Student {
    /// The model.
    pub model: Box<dyn VisionLanguageModel>,
    /// The teacher's side; none where the run has no teacher.
    pub distill: Option<Distill>,
    pub(crate) llm_name: String,
    pub(crate) llm_folder: PathBuf,
    pub(crate) pictures: Pictures,
    pub(crate) image_size: i64,
    pub(crate) chat_template: Option<String>,
    pub(crate) z_loss: f64,
    pub(crate) beta: Option<f64>, // of DPO, where the run learns from preferences
    pub(crate) is_whole: bool,
    pub(crate) is_outline: bool,
    pub(crate) gradient_checkpointing: bool,
    pub(crate) trained: Vec<(&'static str, Weights)>, // sources that handed out parameters, and where in the folder they stand
    pub(crate) made: Vec<(String, Tensor)>,
}

/// What a student is made of.
#[derive(Debug)]
pub struct StudentParts {
    /// The model: any that sees, and takes its pictures among the words.
    pub model: Box<dyn VisionLanguageModel>,
    /// The source that handed out what is trained, f32 parameters by their names in the model's folder; the heads of a
    /// teacher come from it too, so it is one of new weights ([`Weights::random`]).
    pub trained: Weights,
    /// The LLM's source, where its own weights are trained as well ([`Weights::trained`]); names are the LLM's.
    pub llm: Option<Weights>,
    /// Where the LLM lies, with its tokenizer and chat template.
    pub llm_folder: PathBuf,
    /// What the model is shown of a picture.
    pub pictures: Pictures,
}

impl Student {
    /// A student of these parts; `config` has the rest: losses, checkpointing, the chat template. The `model.type` of a
    /// model that is none of those known here is `own`.
    ///
    /// # Errors
    /// Where the model makes other tokens of a picture of `model.image_size` than `pictures` does.
    pub fn from_parts(parts: StudentParts, config: &TrainConfig) -> Result<Self> {
        let StudentParts { model, trained, llm, llm_folder, pictures } = parts;
        let patch_size = pictures.patch_size;
        let (image_size, what) = match config.model.image_size {
            0 => (pictures.square_side()?, "what the image processor makes of a square"),
            given => (given, "model.image_size"),
        };
        let (rows, columns) = model.image_grid(image_size, image_size).context(what)?;
        ensure!(
            (rows * patch_size, columns * patch_size) == (image_size, image_size),
            "{what} is {image_size}, of which the model makes {rows} x {columns} tokens; in patches of {patch_size} pixels \
             that is another size"
        );
        let llm_prefix = model.llm_prefix();
        Ok(Self {
            pictures: pictures.with_image_marks(model.image_marks()),
            model,
            distill: None,
            llm_name: config.model.llm.clone(),
            llm_folder,
            image_size,
            chat_template: config.chat_template(),
            z_loss: config.model.z_loss(),
            beta: config.dpo_beta(),
            is_whole: false,
            is_outline: false,
            gradient_checkpointing: config.gradient_checkpointing,
            trained: [("", trained)].into_iter().chain(llm.map(|llm| (llm_prefix, llm))).collect(),
            made: Vec::new(),
        })
    }

    /// The same, taught block by block by `teacher`; `config.distill` says which blocks meet. Of a run file the teacher is
    /// `model.aux_vision`, which [`Student::new`] opens; this is for one of the caller's own. A checkpoint holds its heads,
    /// not the teacher: whoever resumes the run brings it again.
    ///
    /// # Errors
    /// Where there is a teacher already, where blocks are asked for that one of both lacks, where the teacher's hidden states
    /// are not as it says, and where `distill.cache` is set, which knows a teacher by the files of its folder.
    pub fn with_teacher(self, teacher: Box<dyn Teacher>, config: &TrainConfig) -> Result<Self> {
        ensure!(self.distill.is_none(), "there is a teacher already: model.aux_vision");
        ensure!(
            config.distill.cache.is_none(),
            "distill.cache knows a teacher by the files of its folder, one of a program's own has none"
        );
        let student = self.taught(teacher, config)?;
        if let Some(distill) = &student.distill {
            distill.check_teacher(student.image_size, student.device())?;
        }
        Ok(student)
    }

    /// The same with heads, and the teacher that they meet.
    pub(crate) fn taught(mut self, teacher: Box<dyn Teacher>, config: &TrainConfig) -> Result<Self> {
        let llm = self.model.llm().config();
        let layers = match self.model.lora() {
            Some(lora) => usize::try_from(lora.layers)?.min(llm.num_hidden_layers),
            None => llm.num_hidden_layers,
        };
        let (_, trained) = self.trained.first().context("a student has a source of what is trained")?;
        let patch_size = self.pictures.patch_size;
        self.distill = Some(Distill::new(teacher, layers, llm, patch_size, &config.distill, trained)?);
        Ok(self)
    }

    /// The name that the run file knows the LLM by.
    pub fn llm_name(&self) -> &str {
        &self.llm_name
    }

    /// Where the LLM lies, with its tokenizer and chat template.
    pub fn llm_folder(&self) -> &Path {
        &self.llm_folder
    }

    /// What becomes of words and pictures before it reads them; `config` is that of the run.
    ///
    /// # Errors
    /// Where the LLM's folder has no tokenizer or chat template that fits it.
    pub fn preparation(&self, config: &TrainConfig) -> Result<Preparation> {
        preparation_over(&self.llm_folder, &self.pictures, self.model.has_processor(), config)
    }

    /// What it is shown of a picture.
    pub fn pictures(&self) -> &Pictures {
        &self.pictures
    }

    /// Side of its square pictures, in pixels: `model.image_size`, or what the processor makes of a square where pictures keep
    /// their shape and the run file gives none.
    pub fn image_size(&self) -> i64 {
        self.image_size
    }

    /// Whether what is saved is the whole model: a VoRA without adapters, all of whose weights are trained, or which goes
    /// on from a merged one.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// Whether its frozen weights are shapes alone ([`Student::outline`]).
    pub fn is_outline(&self) -> bool {
        self.is_outline
    }

    /// What `make` makes where others of the processes that share its weights ([`Student::sharded`]) may make more passes
    /// through the model, or fewer, forward alone: all call it, and each waits for the others at the end. A student of this
    /// process alone makes it and nothing more.
    ///
    /// # Errors
    /// That of `make`, and where one of the processes is gone.
    pub fn apart<T>(&self, make: impl FnOnce() -> Result<T>) -> Result<T> {
        self.begin_apart();
        let made = make();
        self.end_apart()?;
        made
    }

    /// Where [`Student::apart`] begins.
    pub fn begin_apart(&self) {
        if let Some(shards) = self.model.llm().decoder().shards() {
            shards.part();
        }
    }

    /// Where [`Student::apart`] ends.
    ///
    /// # Errors
    /// Where one of the processes is gone.
    pub fn end_apart(&self) -> Result<()> {
        let decoder = self.model.llm().decoder();
        decoder.shards().map_or(Ok(()), |shards| shards.meet(|| decoder.gather_forward()))
    }

    /// What stands in place of the LLM's own chat template.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Where the tensors are.
    pub fn device(&self) -> Device {
        self.model.llm().device()
    }

    /// Everything trained, by its name on disk.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        let of = |(prefix, weights): &(&str, Weights)| {
            weights.parameters().into_iter().map(move |(name, tensor)| (format!("{prefix}{name}"), tensor)).collect()
        };
        self.trained.iter().flat_map::<Vec<_>, _>(of).collect()
    }

    /// What the run makes before its first step and no step changes, by its name on disk: a Chameleon's image tokenizer.
    pub fn made(&self) -> &[(String, Tensor)] {
        &self.made
    }

    /// What the language loss is summed over: the pairs of a run that learns from preferences, else tokens: supervised
    /// words, and the pictures' tokens where the model writes them.
    pub fn num_targets(&self, batch: &DeviceBatch) -> i64 {
        if self.beta.is_some() {
            return batch.pairs.len() as i64;
        }
        batch.targets.size()[0] + if self.writes_pictures() { batch.num_image_tokens() } else { 0 }
    }

    /// Whether the model learns to write pictures as well as words.
    pub fn writes_pictures(&self) -> bool {
        self.model.image_writer().is_some()
    }

    /// Whether batches are to compute once what all their samples begin with: where attention computes of a long row what
    /// its documents attend to and nothing more. Not where pictures are written, as the place before one predicts it.
    pub fn shares_starts(&self) -> bool {
        let llm = self.model.llm();
        let drops = llm.config().attention_dropout.is_some_and(|dropped| dropped > 0.0); // takes a mask
        has_attention(llm.device(), llm.kind()) && !drops && !self.writes_pictures()
    }

    /// What goes into the decoder, `[batch, seq, hidden]`, the places in `batch * seq` that are learned to predict from,
    /// and the right tokens.
    fn learned(&self, batch: &DeviceBatch) -> Result<(Tensor, Tensor, Tensor)> {
        let (positions, targets) = (batch.positions.shallow_clone(), batch.targets.shallow_clone());
        let Some(writer) = self.model.image_writer().filter(|_| batch.num_image_tokens() > 0) else {
            return Ok((self.model.embed(&batch.input)?, positions, targets));
        };
        // Pictures are encoded once: their tokens are read, and are learned to be written.
        let tokens = writer.image_tokens(&batch.input.pixel_values)?; // [image tokens]
        let (made, places) = (tokens.size()[0], batch.num_image_tokens());
        ensure!(made == places, "the pictures make {made} tokens, the text has places for {places}");
        let input_ids = &batch.input.input_ids;
        let input_ids = input_ids.flatten(0, 1).index_copy(0, &batch.image_places, &tokens).view_as(input_ids);
        // A picture's first token follows the mark that begins it.
        let before = &batch.image_places - 1;
        let (positions, targets) = (Tensor::cat(&[positions, before], 0), Tensor::cat(&[targets, tokens], 0));
        Ok((self.model.llm().embed(&input_ids), positions, targets))
    }

    /// One forward pass, and the way back of what `total` makes of its losses, which are sums and means that
    /// micro-batches can be put together from. `seed` decides what the LLM's dropout drops, where its config has one.
    ///
    /// The losses are lent to `total` alone: in a run with activation checkpointing, whoever took them backward himself
    /// would leave most of the gradient out ([`vora_llm::Pass`]).
    ///
    /// # Errors
    /// A batch that does not fit the model, and what libtorch says of the way back.
    pub fn backward(&self, batch: &DeviceBatch, seed: DropoutSeed, total: impl FnOnce(Losses) -> Tensor) -> Result<()> {
        let distill = self.distill.as_ref().filter(|_| batch.num_image_tokens() > 0);
        let hidden_layers = distill.map_or(0, |distill| distill.heads().hidden_layers());
        let (inputs_embeds, positions, targets) = self.learned(batch)?;
        let (llm, plan) = (self.model.llm(), self.model.plan(&batch.input.spans)?);
        let dpo = self.beta.map(|beta| {
            let plan = self.model.plan(&batch.input.spans)?;
            anyhow::Ok((Reference::new(llm, &inputs_embeds, plan, batch), beta))
        });
        let dpo = dpo.transpose()?;
        let pass = self.pass(&inputs_embeds, &plan, hidden_layers, seed);
        pass.backward(|output| {
            let (lm_sum, rewards) = match &dpo {
                Some((reference, beta)) => {
                    let pairs = reference.dpo(llm, &output.last_hidden_state, batch, *beta);
                    (pairs.losses.sum(Kind::Float), Some(Rewards::of(&pairs)))
                }
                None => {
                    let hidden = output.last_hidden_state.flatten(0, 1).index_select(0, &positions); // [n, hidden]
                    let (chunk, logits) = (logits_chunk(llm), |rows: &Tensor| llm.logits(rows));
                    (cross_entropy_and_z_loss(&hidden, &targets, chunk, self.z_loss, logits), None)
                }
            };
            let distill = distill.map(|distill| {
                let targets = distill.targets(&batch.input.pixel_values)?;
                let losses = distill.heads().losses(&output.hidden_states, &batch.image_places, &targets); // [blocks]
                anyhow::Ok((losses.mean(Kind::Float), losses.detach()))
            });
            let (distill, distill_blocks) = distill.transpose()?.unzip();
            Ok(total(Losses { lm_sum, rewards, distill, distill_blocks }))
        })
    }

    /// A training forward of the LLM, with the hidden states of so many layers.
    pub fn pass<'a>(
        &'a self,
        inputs_embeds: &Tensor,
        plan: &'a AttentionPlan,
        hidden_layers: usize,
        seed: DropoutSeed,
    ) -> Pass<'a> {
        let forward = if self.gradient_checkpointing { Decoder::forward_recomputed } else { Decoder::forward_train };
        forward(self.model.llm().decoder(), inputs_embeds, plan, hidden_layers, seed)
    }

    /// Per block what the teacher has at the image tokens and what the head makes of them there, each
    /// `[image tokens, teacher_hidden]` in f32; none without a teacher or a picture.
    ///
    /// # Errors
    /// Where the batch does not fit the model.
    pub fn block_features(&self, batch: &DeviceBatch) -> Result<Option<Vec<(Tensor, Tensor)>>> {
        let Some(distill) = self.distill.as_ref().filter(|_| batch.num_image_tokens() > 0) else { return Ok(None) };
        let output = self.model.forward(&batch.input, distill.heads().hidden_layers())?;
        let students = distill.heads().outputs(&output.hidden_states, &batch.image_places);
        Ok(Some(distill.targets(&batch.input.pixel_values)?.into_iter().zip(students).collect()))
    }

    /// Logits at the supervised places, `[n, vocab]`, for evaluation.
    ///
    /// # Errors
    /// Where the batch does not fit the model.
    pub fn answer_logits(&self, batch: &DeviceBatch) -> Result<Tensor> {
        let output = self.model.forward(&batch.input, 0)?;
        let hidden = output.last_hidden_state.flatten(0, 1).index_select(0, &batch.positions);
        Ok(self.model.llm().logits(&hidden))
    }
}
