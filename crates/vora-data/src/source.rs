//! Where samples come from.

use std::borrow::Cow;
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::frames::short_name;
use crate::record::Conversations;
use crate::sample::{Sample, SampleMaker};
use crate::scenes::Scenes;
use crate::shuffle::Shuffle;

/// Samples by number: the same number always gives the same sample.
pub trait Source: Send + Sync {
    /// How many there are; none where they never end.
    fn len(&self) -> Option<u64>;

    /// Whether there are none at all.
    fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// Whether it is read from its start on, so that only samples nearly in order are quickly made.
    fn is_stream(&self) -> bool {
        false
    }

    /// Makes the sample of this number.
    ///
    /// # Errors
    /// Where its record is bad: the error says which and why, and the next number may well be good.
    fn sample(&self, index: u64) -> Result<Sample>;

    /// The sample at a place of an endless walk: pass after pass, each in an order of its own where there is a seed
    /// to shuffle by. Samples are asked for nearly in order, by several threads.
    ///
    /// # Errors
    /// As [`Source::sample`].
    fn walk(&self, place: u64, seed: Option<u64>) -> Result<Sample> {
        self.sample(match (self.len(), seed) {
            (None, _) => place,
            (Some(len), None) => place % len,
            (Some(len), Some(seed)) => Shuffle::new(len, seed, place / len).get(place % len),
        })
    }
}

/// Procedural scenes, several questions packed behind one picture.
#[derive(Debug)]
pub struct SceneSource {
    scenes: Scenes,
    maker: Arc<SampleMaker>,
}

impl SceneSource {
    /// Scenes of one split.
    pub fn new(scenes: Scenes, maker: Arc<SampleMaker>) -> Self {
        Self { scenes, maker }
    }
}

impl Source for SceneSource {
    fn len(&self) -> Option<u64> {
        None
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        let id = format!("{}-{index}", self.scenes.split());
        self.maker.packed(id, &self.scenes.render(index), self.scenes.questions(index))
    }
}

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

/// Several sources with an end, one after the other; shuffled, they mix.
pub struct Chain {
    sources: Vec<(u64, Arc<dyn Source>)>, // with the number of samples up to its end
}

impl Chain {
    /// # Panics
    /// Where a source never ends: nothing after it would be reached.
    pub fn new(sources: impl IntoIterator<Item = Arc<dyn Source>>) -> Self {
        let mut end = 0;
        let with_end = |source: Arc<dyn Source>| {
            end += source.len().expect("a source with an end");
            (end, source)
        };
        Self { sources: sources.into_iter().map(with_end).collect() }
    }
}

impl Source for Chain {
    fn len(&self) -> Option<u64> {
        Some(self.sources.last().map_or(0, |(end, _)| *end))
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        let place = self.sources.partition_point(|(end, _)| *end <= index);
        let (_, source) = self.sources.get(place).context("there is no such sample")?;
        let start = if place == 0 { 0 } else { self.sources[place - 1].0 };
        source.sample(index - start)
    }
}

/// Samples of one token, for tests: its id and its number. The numbers in `bad` are bad.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct Numbers {
    pub(crate) len: Option<u64>,
    pub(crate) bad: Vec<u64>,
}

#[cfg(test)]
impl Source for Numbers {
    fn len(&self) -> Option<u64> {
        self.len
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        anyhow::ensure!(!self.bad.contains(&index), "number {index} is bad");
        Ok(Sample {
            id: index.to_string(),
            input_ids: vec![index as i64],
            targets: vec![0],
            spans: vec![vora_text::Span::text(1)],
            images: Vec::new(),
            questions: Vec::new(),
            cut_answers: 0,
            notes: Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::scenes::{ScenesConfig, Split};
    use crate::{Loader, LoaderConfig, sample};

    fn conversations(folder: &Path, image_folder: &Path) -> ConversationSource {
        let conversations = Conversations::open(&folder.join("conversations.jsonl"), image_folder).unwrap();
        ConversationSource::new(conversations, Arc::new(sample::tests::tiny()))
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

    #[test]
    fn scenes_come_packed() {
        let maker = Arc::new(sample::tests::tiny());
        let scenes = Scenes::new(ScenesConfig::default(), Split::Train).unwrap();
        let questions = scenes.questions(3);
        let sample = SceneSource::new(scenes, maker.clone()).sample(3).unwrap();
        assert_eq!(sample.id, "train-3");
        for (asked, question) in sample.questions.iter().zip(&questions) {
            assert_eq!((asked.kind.as_str(), &asked.question), (question.kind.name(), &question.question));
            let answer = maker.preparation().tokenizer.decode(&sample.targets[asked.tokens.clone()], true).unwrap();
            assert_eq!(answer, question.answer);
        }
    }

    #[test]
    fn a_chain_counts_through_its_sources() {
        let numbers = |len| Arc::new(Numbers { len: Some(len), bad: Vec::new() }) as Arc<dyn Source>;
        let chain = Chain::new([numbers(2), numbers(0), numbers(3)]);
        let ids: Vec<_> = (0..5).map(|index| chain.sample(index).unwrap().id).collect();
        assert_eq!((chain.len(), ids.join(" ").as_str()), (Some(5), "0 1 0 1 2"));
        assert!(chain.sample(5).unwrap_err().to_string().contains("no such sample"));
    }
}
