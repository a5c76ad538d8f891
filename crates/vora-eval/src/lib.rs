//! How well a model answers: scores equal to the published scorers, each beside a blind control, perplexity, what it
//! keeps of its language, and the runner that asks a model every question of a file. It trains nothing and prints nothing.
//!
//! ```
//! use vora_eval::scores::vqa_accuracy;
//!
//! let references = ["red", "red", "red", "dark red"].map(str::to_owned);
//! assert_eq!(vqa_accuracy("Red.", &references), 0.75);
//! ```

mod blind;
mod budgets;
mod greedy;
pub mod language;
mod perplexity;
mod question;
mod question_set;
mod record;
mod report;
mod runner;
pub mod scores;
mod spoken;
mod tally;
mod task;

pub use blind::show_other_pictures;
pub use budgets::{Budget, Budgets};
pub use greedy::greedy_answers;
pub use perplexity::{Perplexity, perplexity};
pub use question::Question;
pub use question_set::QuestionSet;
pub use report::{Answered, Report};
pub use runner::{Asking, answer, engine_config};
pub use spoken::spoken;
pub use tally::Tally;
pub use task::Task;
