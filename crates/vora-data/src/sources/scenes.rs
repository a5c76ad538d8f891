//! Samples of procedural scenes.

use std::sync::Arc;

use anyhow::Result;

use super::source::Source;
use crate::maker::SampleMaker;
use crate::sample::Sample;
use crate::scenes::Scenes;

/// Procedural scenes, several questions packed after one picture; in pairs each with a right and a wrong answer.
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
        let picture = self.scenes.render(index);
        if self.maker.makes_pairs() {
            return self.maker.packed_pairs(id, &picture, self.scenes.pairs(index));
        }
        self.maker.packed(id, &picture, self.scenes.questions(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::maker;
    use crate::scenes::{ScenesConfig, Split};

    #[test]
    fn scenes_come_in_pairs() {
        let maker = Arc::new(SampleMaker::of_pairs(maker::tests::tiny().preparation().clone()));
        let scenes = Scenes::new(ScenesConfig::default(), Split::Train).unwrap();
        let pairs = scenes.pairs(3);
        let sample = SceneSource::new(scenes, maker.clone()).sample(3).unwrap();
        assert_eq!(sample.questions.len(), 2 * pairs.len());
        for (asked, (question, wrong)) in sample.questions.chunks(2).zip(&pairs) {
            for (asked, answer) in asked.iter().zip([&question.answer, wrong]) {
                assert_eq!((asked.kind.as_str(), &asked.question), (question.kind.name(), &question.question));
                let said = maker.preparation().tokenizer.decode(&sample.targets[asked.tokens.clone()], true).unwrap();
                assert_eq!((&said, asked.is_rejected), (answer, answer == wrong));
            }
        }
    }

    #[test]
    fn scenes_come_packed() {
        let maker = Arc::new(maker::tests::tiny());
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
}
