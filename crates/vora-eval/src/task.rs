//! What is scored.

use std::collections::HashSet;
use std::str::FromStr;

use anyhow::{Error, Result, bail};

use crate::question::Question;

/// What is scored of answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Task {
    /// Exact match; of descriptions of scenes, the same set of colour, shape and place.
    Exact,
    /// The accuracy of VQAv2.
    Vqa,
    /// Accuracy, precision, recall, F1 and share of yes, as POPE reports them.
    Yesno,
    /// BLEU, ROUGE-L and CIDEr.
    Caption,
}

impl Task {
    /// Every task.
    pub const ALL: [Self; 4] = [Self::Exact, Self::Vqa, Self::Yesno, Self::Caption];

    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Vqa => "vqa",
            Self::Yesno => "yesno",
            Self::Caption => "caption",
        }
    }
}

impl FromStr for Task {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match Self::ALL.into_iter().find(|task| task.name() == name) {
            Some(task) => Ok(task),
            None => bail!("unknown task `{name}`, known are {}", Self::ALL.map(Self::name).join(", ")),
        }
    }
}

/// What one question is made for, as often as it is asked.
pub(crate) fn task_of(asked: &[&Question]) -> Task {
    let is_yes_no = |text: &String| ["yes", "no"].contains(&text.trim().to_lowercase().as_str());
    let has_captions = asked.iter().any(|question| !question.captions.is_empty()) || asked[0].text().is_empty();
    let answers: HashSet<&[String]> = asked.iter().map(|question| question.references.as_slice()).collect();
    if has_captions {
        Task::Caption
    } else if asked.iter().all(|question| question.references.iter().all(is_yes_no)) {
        Task::Yesno
    } else if answers.len() > 1 && answers.iter().all(|answer| answer.len() == 1) {
        Task::Caption
    } else if asked.iter().any(|question| question.has_question_key) {
        Task::Vqa
    } else {
        Task::Exact
    }
}
