//! What a model is asked: conversations of a file, or scenes, each question with the answers that are expected.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use vora_data::scenes::{Scenes, ScenesConfig, Split};
use vora_data::{Conversations, short_name};
use vora_image::RgbImage;
use vora_text::Message;

use crate::question::Question;
use crate::record::Asked;
use crate::task::{Task, task_of};

/// How many scenes are asked about unless `--limit` says.
const SCENES: u64 = 100;

/// How many may be asked about: each has some questions, all of which are made first.
const MOST_SCENES: u64 = 100_000;

/// Questions, and where their pictures are.
#[derive(Debug)]
pub struct QuestionSet {
    /// Every question.
    pub questions: Vec<Question>,
    /// What could not be read: where it is and why.
    pub left_out: Vec<String>,
    /// What of the records was not taken as it stands, and of how many.
    pub notes: BTreeMap<String, usize>,
    pictures: Pictures,
}

#[derive(Debug)]
enum Pictures {
    Files(Conversations),
    Scenes(Scenes),
}

impl QuestionSet {
    /// Reads up to `limit` records of `data`: a file of JSON lines, its pictures under `images` or beside it, or
    /// `scenes:test`, `scenes:unseen` and `scenes:shaped`.
    ///
    /// # Errors
    /// Where the data cannot be read, name a picture that is not there, or ask nothing; where the limit is more scenes than can be asked about.
    pub fn open(data: &str, images: Option<&Path>, limit: Option<u64>) -> Result<Self> {
        match data.strip_prefix("scenes:") {
            Some(split) => Self::scenes(split, limit.unwrap_or(SCENES)),
            None => Self::file(Path::new(data), images, limit),
        }
    }

    fn scenes(split: &str, limit: u64) -> Result<Self> {
        let split = match split {
            "test" => Split::Test,
            "unseen" => Split::Unseen,
            "shaped" => Split::Shaped,
            other => bail!("unknown split `{other}`: use scenes:test, scenes:unseen or scenes:shaped"),
        };
        ensure!(limit <= MOST_SCENES, "a limit of {limit} pictures, of scenes it is {MOST_SCENES} or less");
        let scenes = Scenes::new(ScenesConfig::default(), split)?;
        let mut questions = Vec::new();
        for index in 0..limit {
            for question in scenes.questions(index) {
                questions.push(Question {
                    id: format!("{split}-{index}"),
                    kind: Some(question.kind.name().to_owned()),
                    messages: vec![Message::question_about(1, &question.question)],
                    pictures: vec![index.to_string()],
                    references: vec![question.answer],
                    captions: Vec::new(),
                    has_question_key: false,
                });
            }
        }
        Ok(Self { questions, left_out: Vec::new(), notes: BTreeMap::new(), pictures: Pictures::Scenes(scenes) })
    }

    fn file(path: &Path, images: Option<&Path>, limit: Option<u64>) -> Result<Self> {
        let beside =
            path.parent().filter(|parent| !parent.as_os_str().is_empty()).map_or(PathBuf::from("."), Path::to_owned);
        let records = Conversations::open(path, images.unwrap_or(&beside))?;
        let (mut questions, mut left_out, mut missing) = (Vec::new(), Vec::new(), Vec::new());
        let mut notes: BTreeMap<String, usize> = BTreeMap::new();
        for index in 0..records.len().min(limit.unwrap_or(u64::MAX)) {
            let place = records.place(index);
            let asked = match records.line(index).and_then(|line| Asked::read(&line, &place)) {
                Ok(asked) => asked,
                Err(error) => {
                    left_out.push(format!("{place}: {error:#}"));
                    continue;
                }
            };
            let pictures = asked.questions.last().map_or(&[][..], |question| &question.pictures); // it has all of them
            if let Some(error) = pictures.iter().find_map(|picture| records.find_image(picture).err()) {
                missing.push(format!("{place}: {error:#}"));
            }
            for note in asked.notes {
                *notes.entry(note).or_default() += 1;
            }
            questions.extend(asked.questions);
        }
        if let [first, ..] = missing.as_slice() {
            bail!(
                "{} records name a picture that is not there; the first: {first}; --images takes the folder that the \
                 pictures are in",
                missing.len()
            );
        }
        ensure!(
            !questions.is_empty(),
            "no record of {} can be asked about; the first: {}",
            path.display(),
            left_out.first().map_or("none was read", String::as_str)
        );
        Ok(Self { questions, left_out, notes, pictures: Pictures::Files(records) })
    }

    /// The task that most of the distinct questions are made for, and how many of how many those are.
    ///
    /// A question is made for captions where its record has some, where it has no words, or where it is asked several
    /// times and every time another single answer is expected; for yes/no where nothing else is expected; for VQA where it
    /// has a key of its own; else for exact match.
    ///
    /// # Errors
    /// Where no task has the most of them.
    pub fn task(&self) -> Result<(Task, String)> {
        if matches!(self.pictures, Pictures::Scenes(_)) {
            return Ok((Task::Exact, "as all scenes".to_owned()));
        }
        let mut distinct: HashMap<(&[String], String), Vec<&Question>> = HashMap::new();
        for question in &self.questions {
            distinct.entry((&question.pictures, question.text())).or_default().push(question);
        }
        let mut votes: BTreeMap<Task, usize> = BTreeMap::new();
        for asked in distinct.values() {
            *votes.entry(task_of(asked)).or_default() += 1;
        }
        let most = votes.values().copied().max().unwrap_or(0);
        let won: Vec<Task> = votes.iter().filter(|(_, count)| **count == most).map(|(task, _)| *task).collect();
        let [task] = won[..] else {
            let names: Vec<_> = won.iter().map(|task| format!("`{}`", task.name())).collect();
            bail!(
                "as many of the {} distinct questions are made for {}: --task says what is scored",
                distinct.len(),
                names.join(" as for ")
            );
        };
        Ok((task, format!("by {most} of {} distinct questions", distinct.len())))
    }

    /// Makes the questions those of a task: for captions, one of all that are about the same pictures.
    ///
    /// # Errors
    /// Names the question that does not fit the task.
    pub fn prepare(&mut self, task: Task) -> Result<()> {
        match task {
            Task::Caption => self.gather_captions(),
            Task::Yesno => self.questions.iter().try_for_each(|question| question.expects_yes().map(drop))?,
            Task::Exact | Task::Vqa => {}
        }
        Ok(())
    }

    /// Makes one question of all that are about the same pictures, the captions of any of them its references.
    fn gather_captions(&mut self) {
        let mut gathered: Vec<Question> = Vec::new();
        let mut places: BTreeMap<Vec<String>, usize> = BTreeMap::new();
        for mut question in std::mem::take(&mut self.questions) {
            let captions = std::mem::take(&mut question.captions);
            if !captions.is_empty() {
                question.references = captions;
            }
            match places.get(&question.pictures) {
                // Each record of a picture may have all of its captions.
                Some(&place) if gathered[place].references == question.references => {}
                Some(&place) => gathered[place].references.append(&mut question.references),
                None => {
                    places.insert(question.pictures.clone(), gathered.len());
                    gathered.push(question);
                }
            }
        }
        self.questions = gathered;
    }

    /// Decodes pictures by their names in the data.
    pub(crate) fn decode(&self, pictures: &[String]) -> Result<Vec<RgbImage>> {
        let decode = |name: &String| match &self.pictures {
            Pictures::Files(records) => {
                vora_image::decode_image(&records.image(name)?).with_context(|| format!("image `{}`", short_name(name)))
            }
            Pictures::Scenes(scenes) => Ok(scenes.render(name.parse()?)),
        };
        pictures.iter().map(decode).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a folder with three pictures.
    fn open(lines: &str) -> Result<QuestionSet> {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c"] {
            std::fs::write(folder.path().join(name), name).unwrap();
        }
        let path = folder.path().join("data.jsonl");
        std::fs::write(&path, lines).unwrap();
        QuestionSet::open(&path.to_string_lossy(), None, None)
    }

    #[test]
    fn the_blind_control_is_a_derangement() {
        let line = |frames: &str| format!(r#"{{"frames": {frames}, "question": "What?", "answer": "red"}}"#);
        let frames = [r#"["a"]"#, r#"["b"]"#, r#"["a"]"#, r#"["c"]"#, r#"["a", "b"]"#, "[]"];
        let set = open(&frames.map(line).join("\n")).unwrap();
        let lists = set.questions.iter().map(|question| question.pictures.as_slice());
        let others: Vec<_> =
            crate::blind::other_pictures(lists).into_iter().map(|other| other.map(|list| list.concat())).collect();
        let expected = [Some("b"), Some("c"), Some("b"), Some("a"), None, None];
        assert_eq!(others, expected.map(|other| other.map(str::to_owned)));
    }

    fn turns(picture: &str, answer: &str, extra: &str) -> String {
        let turns = r#""conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "#;
        format!(r#"{{"image": "{picture}", {turns}"{answer}"}}]{extra}}}"#)
    }

    fn asked(picture: &str, answers: &str) -> String {
        format!(r#"{{"images": ["{picture}"], "question": "What?", "answers": {answers}}}"#)
    }

    #[test]
    fn the_data_say_what_the_task_is() {
        let task = |lines: &[String]| open(&lines.join("\n")).unwrap().task().unwrap().0;
        assert_eq!(task(&[turns("a", "red", "")]), Task::Exact);
        assert_eq!(task(&[turns("a", "Yes", "")]), Task::Yesno);
        assert_eq!(task(&[turns("a", "red", r#", "question": "What?""#)]), Task::Vqa);
        assert_eq!(task(&[turns("a", "red", r#", "captions": ["a", "b"]"#)]), Task::Caption);
        assert_eq!(task(&[turns("a", "red", ""), turns("a", "a ring", "")]), Task::Caption);
        assert_eq!(task(&[r#"{"image": "a", "caption": "A ring."}"#.to_owned()]), Task::Caption);
        assert_eq!(QuestionSet::open("scenes:test", None, Some(3)).unwrap().task().unwrap().0, Task::Exact);
    }

    #[test]
    fn the_majority_of_distinct_questions_decides() {
        let task = |lines: &[String]| open(&lines.join("\n")).unwrap().task();
        let vqa = ["a", "b", "c"].map(|picture| asked(picture, r#"["red", "rose"]"#));
        let doubled = |lines: &[String]| [lines, &lines[..1]].concat();
        let (found, by) = task(&doubled(&vqa)).unwrap();
        assert_eq!((found, by.as_str()), (Task::Vqa, "by 3 of 3 distinct questions"));
        let yes_no = ["a", "b", "c"].map(|picture| asked(picture, r#"["yes"]"#));
        assert_eq!(task(&doubled(&yes_no)).unwrap().0, Task::Yesno);
        // One that is asked twice with another answer each time does not outweigh the others either.
        let other_answer = [&vqa[..], &[asked("a", r#""red""#), asked("a", r#""blue""#)]].concat();
        assert_eq!(task(&other_answer).unwrap().0, Task::Vqa);
        let captions = ["a", "b", "a", "b", "c"].iter().zip(["1", "2", "3", "4", "5"]);
        let captions: Vec<_> = captions.map(|(picture, answer)| turns(picture, answer, "")).collect();
        let (found, by) = task(&captions).unwrap();
        assert_eq!((found, by.as_str()), (Task::Caption, "by 2 of 3 distinct questions"));

        let error = task(&[yes_no[0].clone(), vqa[1].clone()]).unwrap_err().to_string();
        assert!(error.contains("as many of the 2 distinct questions") && error.contains("--task"), "{error}");
        assert!(error.contains("`vqa`") && error.contains("`yesno`"), "{error}");
    }

    #[test]
    fn a_picture_that_is_not_there_is_an_error() {
        let lines = [asked("a", r#""red""#), asked("nowhere.png", r#""red""#), asked("../x.png", r#""red""#)];
        let error = format!("{:#}", open(&lines.join("\n")).unwrap_err());
        assert!(error.starts_with("2 records name a picture that is not there"), "{error}");
        assert!(
            error.contains("data.jsonl:2: cannot read image `nowhere.png`") && error.contains("--images"),
            "{error}"
        );
        let base64 = format!("iVBORw0KGgo{}", "A".repeat(5001));
        let inline = open(&asked("a", r#""red""#).replace(r#""a""#, &format!(r#"{{"bytes": "{base64}"}}"#))).unwrap();
        let error = format!("{:#}", inline.decode(&inline.questions[0].pictures).unwrap_err());
        assert!(error.contains("image `data:;base64,iVBORw0KGgoAAA") && error.len() < 400, "{error}");
    }
}
