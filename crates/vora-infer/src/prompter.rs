//! What stands between a person and a model: tokenizer, chat template, image processor.

use std::borrow::Cow;
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Result, ensure};
use tch::Tensor;
use vora_image::{ImageProcessor, Pixels};
use vora_model::{Input, VisionLanguageModel};
use vora_text::{ChatTemplate, Piece, TextError, Tokenizer};

use crate::error::InferError;
use crate::grammar::{Grammar, Grammars};
use crate::request::{Request, ResponseFormat};

/// Makes of requests what a model is prompted with; it holds no weights.
#[derive(Debug)]
pub(crate) struct Prompter {
    pub(crate) tokenizer: Tokenizer,
    chat: ChatTemplate,
    processor: Option<ImageProcessor>, // none where the model takes no picture
    grammars: OnceLock<Grammars>,      // made for the first answer of a given form
}

/// A request as it will meet the model.
#[derive(Debug)]
pub(crate) struct Prompt {
    pieces: Vec<Piece>,
    pictures: Vec<Pixels>,
    pub(crate) grammar: Option<Grammar>,
}

impl Prompter {
    /// What lies in `folder` beside the weights of `model`.
    ///
    /// # Errors
    /// Names the file, and what in it does not fit.
    pub(crate) fn open(model: &dyn VisionLanguageModel, folder: &Path) -> Result<Self> {
        let (rows, has_processor) = (model.llm().config().vocab_size, model.has_processor());
        let processor = model.sees().then(|| ImageProcessor::open(folder)).transpose()?;
        if let Some(side) = processor.as_ref().and_then(ImageProcessor::token_size) {
            let grid = model.image_grid(i64::from(side), i64::from(side)).ok();
            ensure!(
                grid == Some((1, 1)),
                "the image processor of {} takes {side} x {side} pixels for a token, its model does not: their patch_size \
                 and pooling_kernel_size differ",
                folder.display()
            );
        }
        let tokenizer = Tokenizer::open(folder)?.for_embedding(rows).for_processor(has_processor);
        Ok(Self::new(tokenizer, ChatTemplate::open(folder)?, processor))
    }

    /// Of parts that are open already; `processor` is none where the model takes no picture.
    pub(crate) fn new(tokenizer: Tokenizer, chat: ChatTemplate, processor: Option<ImageProcessor>) -> Self {
        Self { tokenizer, chat, processor, grammars: OnceLock::new() }
    }

    /// Renders and encodes the conversation, and prepares its pictures.
    ///
    /// # Errors
    /// [`InferError::SeesNoPictures`], [`InferError::BadImage`], [`InferError::BadSchema`], [`InferError::BadMessages`]; another
    /// budget of tokens for pictures that become squares.
    pub(crate) fn prompt(&self, request: &Request<'_>) -> Result<Prompt> {
        let processor = match (&self.processor, request.max_image_tokens) {
            (Some(processor), Some(most)) => Some(Cow::Owned(processor.with_max_image_tokens(most)?)),
            (processor, _) => processor.as_ref().map(Cow::Borrowed),
        };
        let pictures = request.images.iter().enumerate().map(|(index, image)| {
            let processor = processor.as_ref().ok_or(InferError::SeesNoPictures)?;
            let bad = |problem: anyhow::Error| InferError::BadImage { index, problem: format!("{problem:#}") };
            Ok(processor.preprocess(image).map_err(bad)?)
        });
        let pictures = pictures.collect::<Result<Vec<_>>>()?;
        let refused = |error: anyhow::Error| match error.downcast_ref() {
            Some(TextError::Template { problem, .. }) => InferError::BadMessages { problem: problem.clone() }.into(),
            _ => error,
        };
        let pieces = self.chat.encode_prompt(&self.tokenizer, &request.messages).map_err(refused)?;
        Ok(Prompt { pieces, pictures, grammar: self.grammar(&request.format)? })
    }

    fn grammar(&self, format: &ResponseFormat) -> Result<Option<Grammar>> {
        if *format == ResponseFormat::Text {
            return Ok(None);
        }
        if self.grammars.get().is_none() {
            let _ = self.grammars.set(Grammars::new(&self.tokenizer)?); // another thread may have been faster
        }
        self.grammars.get().map_or(Ok(None), |grammars| grammars.start(format))
    }
}

impl Prompt {
    /// Its pictures, in the order of their places.
    pub(crate) fn pictures(&self) -> &[Pixels] {
        &self.pictures
    }

    /// The same as tensors for `model`.
    ///
    /// # Errors
    /// Where pictures and places differ in number, or the model cannot take a picture's size.
    pub(crate) fn input(&self, model: &dyn VisionLanguageModel) -> Result<Input> {
        let pixel_values: Vec<Tensor> = self.pictures.iter().map(vora_vision::pixel_values).collect();
        Input::prompt(&self.pieces, pixel_values, model)
    }
}
