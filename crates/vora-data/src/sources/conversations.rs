//! Samples of annotation files.

use std::borrow::Cow;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::source::Source;
use crate::maker::SampleMaker;
use crate::records::{Conversations, short_name};
use crate::sample::Sample;

/// Conversations of one annotation file.
#[derive(Debug)]
pub struct ConversationSource {
    conversations: Conversations,
    maker: Arc<SampleMaker>,
}

impl ConversationSource {
    /// All records of one file.
    pub fn new(conversations: Conversations, maker: Arc<SampleMaker>) -> Self {
        Self { conversations, maker }
    }
}

impl Source for ConversationSource {
    fn len(&self) -> Option<u64> {
        Some(self.conversations.len())
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        let record = self.conversations.record(index)?;
        let decode = |idx: usize| {
            let frame = &record.frames[idx];
            let image = vora_image::decode_image(&self.conversations.image(frame)?);
            image.map(Cow::Owned).with_context(|| format!("image `{}`", short_name(frame)))
        };
        let sample = self.maker.decoded_conversation(&record, record.frames.len(), decode);
        sample.with_context(|| self.conversations.place(index))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::{Loader, LoaderConfig, maker};

    fn conversations(folder: &Path, image_folder: &Path) -> ConversationSource {
        let conversations = Conversations::open(&folder.join("conversations.jsonl"), image_folder).unwrap();
        ConversationSource::new(conversations, Arc::new(maker::tests::tiny()))
    }

    #[test]
    fn conversations_show_their_images() {
        let folder = fixtures::root().join("tiny/data");
        let source = conversations(&folder, &folder.join("images"));
        assert_eq!(source.len(), Some(4));
        for index in 0..4 {
            let sample = source.sample(index).unwrap();
            assert_eq!((sample.id, sample.images.len()), (format!("train-{index}"), 1));
            assert!(!sample.questions.is_empty() && sample.questions.iter().all(|question| question.kind == "turn"));
        }
    }

    #[test]
    fn bad_images_are_bad_records_by_line_and_name() {
        let folder = tempfile::tempdir().unwrap();
        let data = fixtures::root().join("tiny/data");
        fs::copy(data.join("conversations.jsonl"), folder.path().join("conversations.jsonl")).unwrap();
        let whole = fs::read(data.join("images/0.png")).unwrap();
        fs::write(folder.path().join("0.png"), &whole[..whole.len() / 2]).unwrap(); // cut
        fs::write(folder.path().join("1.png"), "no picture").unwrap();
        fs::write(folder.path().join("3.png"), &whole).unwrap(); // and 2.png is missing
        let source = conversations(folder.path(), folder.path());
        for (index, text) in ["image `0.png`", "image `1.png`", "cannot read image `2.png`"].iter().enumerate() {
            let message = format!("{:#}", source.sample(index as u64).unwrap_err());
            let place = format!("conversations.jsonl:{}: ", index + 1);
            assert!(message.contains(&place) && message.contains(text), "{message}");
        }
        let config = LoaderConfig { batch_size: 2, num_workers: 2, end: Some(4), ..LoaderConfig::default() };
        let mut loader = Loader::new(Arc::new(source), config).unwrap();
        let batch = loader.next().unwrap().unwrap();
        assert_eq!((batch.batch, batch.samples[0].id.as_str(), loader.num_skipped()), (1, "train-3", 3));
        assert!(loader.next().is_none());
    }
}
