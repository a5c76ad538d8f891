//! Yes or no, as POPE reads and reports it (Li et al. 2023, arXiv 2305.10355, its `evaluate.py`).

use serde::Serialize;

/// Whether an answer says yes: where its first sentence has none of the words `No`, `no` and `not`.
///
/// So anything that denies nothing is a yes; the yes-share shows a model that answers at random.
pub fn says_yes(answer: &str) -> bool {
    let first = answer.split('.').next().unwrap_or_default().replace(',', "");
    !first.split(' ').any(|word| ["No", "no", "not"].contains(&word))
}

/// How yes/no questions were answered; yes is what precision and recall are of. The default is that none was.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
#[non_exhaustive]
pub struct YesNo {
    /// Share answered right.
    pub accuracy: f64,
    /// Share of right ones among those answered yes; 0 where none was.
    pub precision: f64,
    /// Share answered yes among those that are yes; 0 where none is.
    pub recall: f64,
    /// `2 precision recall / (precision + recall)`; 0 where both are.
    pub f1: f64,
    /// Share answered yes, right or wrong.
    pub yes_share: f64,
}

impl YesNo {
    /// Of `(answered yes, is yes)` for each question; none of no question.
    pub fn of(answers: &[(bool, bool)]) -> Option<Self> {
        let count = |said: bool, is: bool| answers.iter().filter(|&&answer| answer == (said, is)).count() as f64;
        let [true_yes, false_yes, false_no] = [count(true, true), count(true, false), count(false, true)];
        let share = |part: f64, of: f64| if of == 0.0 { 0.0 } else { part / of };
        let n = answers.len() as f64;
        let precision = share(true_yes, true_yes + false_yes);
        let recall = share(true_yes, true_yes + false_no);
        (n > 0.0).then(|| Self {
            accuracy: (true_yes + count(false, false)) / n,
            precision,
            recall,
            f1: share(2.0 * precision * recall, precision + recall),
            yes_share: (true_yes + false_yes) / n,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scores::golden::{assert_near, golden};

    #[test]
    fn matches_reference() {
        let golden = golden();
        for case in golden["yes_no"].as_array().unwrap() {
            let answers: Vec<(bool, bool)> = case["answers"]
                .as_array()
                .unwrap()
                .iter()
                .map(|pair| [&pair[0], &pair[1]].map(|text| text.as_str().unwrap()))
                .map(|[said, is]| (says_yes(said), is == "yes"))
                .collect();
            let found = YesNo::of(&answers).unwrap();
            assert_near(found.accuracy, &case["accuracy"]);
            assert_near(found.precision, &case["precision"]);
            assert_near(found.recall, &case["recall"]);
            assert_near(found.f1, &case["f1"]);
        }
        assert_eq!(YesNo::of(&[]), None);
    }

    #[test]
    fn an_answer_is_read_as_pope_reads_it() {
        for yes in ["yes", "Yes, there is no.", "maybe", "", "Nothing", "It is so. No.", "NO"] {
            assert_eq!(says_yes(yes), yes != "Yes, there is no.", "{yes}");
        }
        for no in ["no", "No, there is none.", "It is not. Yes", "There are no, no dogs"] {
            assert!(!says_yes(no), "{no}");
        }
    }

    #[test]
    fn the_share_of_yes_counts_every_yes() {
        let found = YesNo::of(&[(true, true), (true, false), (true, false), (false, true)]).unwrap();
        assert_eq!((found.yes_share, found.accuracy, found.recall), (0.75, 0.25, 0.5));
    }
}
