//! What becomes of words and pictures before a model reads them.

use std::sync::Arc;

use anyhow::{Context, Result};
use vora_image::ImageProcessor;
use vora_text::{ChatTemplate, Message, Tokenizer};

/// How a model's input is made of words and pictures. It is made once: training, `vora data show`, a run's samples and
/// evaluation all read records by the same one.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Preparation {
    /// The model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The model's chat template.
    pub chat: Arc<ChatTemplate>,
    /// What pictures go through.
    pub processor: ImageProcessor,
    /// Side of the square that becomes one token of a picture, in pixels.
    pub patch_size: usize,
    /// The tokens that the model has before and after every picture; Chameleon has some.
    pub image_marks: Option<(i64, i64)>,
    /// A sample has no more tokens than this, patches included.
    pub max_length: usize,
    /// The tokens that the model was made for, its `max_position_embeddings`: of a sample with more that is noted.
    pub max_positions: usize,
}

impl Preparation {
    /// Words by `tokenizer` and `chat`, pictures by `processor` in patches of `patch_size`, without marks and of any
    /// length; the model looks tokens up in an embedding of `vocab_size` rows.
    ///
    /// # Errors
    /// Where the template writes a token into every conversation that the embedding has no row for.
    pub fn new(
        tokenizer: Tokenizer,
        chat: ChatTemplate,
        vocab_size: i64,
        processor: ImageProcessor,
        patch_size: usize,
    ) -> Result<Self> {
        // What a template writes into every conversation is refused now, not sample by sample.
        let turns = [Message::new("user", "?"), Message::new("assistant", ".")];
        let renders = chat.encode_chat(&tokenizer, &turns).is_ok();
        let tokenizer = tokenizer.for_embedding(vocab_size);
        if renders {
            chat.encode_chat(&tokenizer, &turns).context("the chat template")?;
        }
        let (tokenizer, chat) = (Arc::new(tokenizer), Arc::new(chat));
        Ok(Self {
            tokenizer,
            chat,
            processor,
            patch_size,
            image_marks: None,
            max_length: usize::MAX,
            max_positions: usize::MAX,
        })
    }

    /// The same with tokens before and after every picture.
    #[must_use]
    pub fn with_image_marks(self, image_marks: Option<(i64, i64)>) -> Self {
        Self { image_marks, ..self }
    }

    /// The same with a limit on a sample's tokens.
    #[must_use]
    pub fn with_max_length(self, max_length: usize) -> Self {
        Self { max_length, ..self }
    }

    /// The same for a model that was made for so many tokens.
    #[must_use]
    pub fn with_max_positions(self, max_positions: usize) -> Self {
        Self { max_positions, ..self }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use vora_image::{IMAGENET_DEFAULT, Resample};

    use super::*;

    /// The tiny tokenizer with its template and an embedding of so many rows, pictures of 8 x 8 in patches of 4.
    fn with_rows(vocab_size: i64) -> Result<Preparation> {
        let folder = fixtures::root().join("tiny/tokenizer");
        let (mean, std) = IMAGENET_DEFAULT;
        let processor = ImageProcessor::square(8, mean, std, Resample::Bicubic);
        Preparation::new(Tokenizer::open(&folder)?, ChatTemplate::open(&folder)?, vocab_size, processor, 4)
    }

    /// The same for an embedding of every token, and samples of up to 200 tokens.
    pub(crate) fn tiny() -> Preparation {
        with_rows(i64::MAX).unwrap().with_max_length(200)
    }

    #[test]
    fn a_template_with_a_token_beyond_the_embedding_is_refused() {
        let error = format!("{:#}", with_rows(1).unwrap_err());
        assert!(error.starts_with("the chat template: token `<|im_"), "{error}");
        assert!(error.contains("the model's embedding has 1 rows, the tokenizer 512 tokens"), "{error}");
        with_rows(512).unwrap();
    }
}
