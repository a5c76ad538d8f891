//! What is asked about a scene, and what is right.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::draw::{Draw, Purpose};
use super::scene::{Object, Scene};
use super::{Scenes, Split};

/// What a question is about; an evaluation counts each for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuestionKind {
    /// An object's colour.
    Colour,
    /// An object's shape.
    Shape,
    /// The quarter it is in.
    Where,
    /// How many objects there are.
    HowMany,
    /// Whether there is one of this colour, or of this shape.
    YesNo,
    /// All objects, each with colour, shape and quarter.
    Caption,
}

impl QuestionKind {
    /// Every kind.
    pub const ALL: [Self; 6] = [Self::Colour, Self::Shape, Self::Where, Self::HowMany, Self::YesNo, Self::Caption];

    /// Its key in run files and results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Colour => "colour",
            Self::Shape => "shape",
            Self::Where => "where",
            Self::HowMany => "how_many",
            Self::YesNo => "yes_no",
            Self::Caption => "caption",
        }
    }
}

impl fmt::Display for QuestionKind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A question with its only right answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// What it is about.
    pub kind: QuestionKind,
    /// The question.
    pub question: String,
    /// The answer, one or two words but for captions.
    pub answer: String,
}

/// Questions to choose from, with their weights.
struct Candidates<'a> {
    scenes: &'a Scenes,
    found: Vec<(f64, Question)>,
}

impl Scenes {
    /// `questions_per_image` questions about the scene of this number, or as many as there are, in random order:
    /// each kind in proportion to its weight in the config, no question twice.
    pub fn questions(&self, index: u64) -> Vec<Question> {
        let draw = &mut Draw::new(self.config.seed, self.split as u64, index, Purpose::Questions);
        let mut candidates = self.candidates(&self.scene(index), draw);
        let mut chosen = Vec::with_capacity(self.config.questions_per_image);
        while chosen.len() < self.config.questions_per_image && !candidates.is_empty() {
            let idx = draw.weighted(candidates.iter().map(|candidate| candidate.0));
            chosen.push(candidates.remove(idx).1);
        }
        chosen
    }

    /// Everything that can be asked. In the split `unseen` the object that training never showed is the only one
    /// that questions are about.
    fn candidates(&self, scene: &Scene, draw: &mut Draw) -> Vec<(f64, Question)> {
        let mut candidates = Candidates { scenes: self, found: Vec::new() };
        let asked = if self.split == Split::Unseen { &scene.objects[..1] } else { &scene.objects[..] };
        for object in asked {
            candidates.about(object, scene, 1.0 / asked.len() as f64, draw);
        }
        let num = ["one", "two", "three"][scene.objects.len() - 1];
        candidates.push(1.0, QuestionKind::HowMany, "How many shapes?", num);
        candidates.yes_no(asked, scene, draw);
        candidates.push(1.0, QuestionKind::Caption, "Describe the picture.", &caption(scene));
        candidates.found
    }
}

impl Candidates<'_> {
    fn push(&mut self, share: f64, kind: QuestionKind, question: impl Into<String>, answer: &str) {
        let weight = share * self.scenes.config.weight(kind);
        if weight > 0.0 {
            self.found.push((weight, Question { kind, question: question.into(), answer: answer.to_owned() }));
        }
    }

    /// Colour, shape and place of one object. Among several it is referred to by what is not asked.
    fn about(&mut self, object: &Object, scene: &Scene, share: f64, draw: &mut Draw) {
        let named = scene.objects.len() > 1 || draw.chance(self.scenes.config.named_share);
        let by_colour = draw.chance(0.5);
        let shape = object.shape.name();
        if let Some(colour) = object.colour {
            let question = if named { format!("What color is the {shape}?") } else { "What color is it?".to_owned() };
            self.push(share, QuestionKind::Colour, question, colour.name());
        }
        match object.colour {
            Some(colour) if named => {
                self.push(share, QuestionKind::Shape, format!("Which shape is {}?", colour.name()), shape);
            }
            None if scene.objects.len() > 1 => {}
            _ => self.push(share, QuestionKind::Shape, "What shape is it?", shape),
        }
        let question = match object.colour {
            _ if !named => "Where is it?".to_owned(),
            Some(colour) if by_colour => format!("Where is the {} one?", colour.name()),
            _ => format!("Where is the {shape}?"),
        };
        self.push(share, QuestionKind::Where, question, object.quarter.name());
    }

    /// One question, yes as often as no, about a colour as often as about a shape. Where a colour has no name
    /// nobody can deny that it is, say, red; then a shape is asked for.
    fn yes_no(&mut self, asked: &[Object], scene: &Scene, draw: &mut Draw) {
        let (yes, about_colour) = (draw.chance(0.5), draw.chance(0.5));
        let colours: Vec<_> = asked.iter().filter_map(|object| object.colour).collect();
        let all_named = scene.objects.iter().all(|object| object.colour.is_some());
        let lone = scene.objects.len() == 1;
        let question = if about_colour && (if yes { !colours.is_empty() } else { all_named }) {
            let present = |colour| scene.objects.iter().any(|object| object.colour == Some(colour));
            let colour = if yes { draw.pick(&colours) } else { self.absent(self.scenes.colours(), present, draw) };
            format!("{} {}?", if lone { "Is it" } else { "Is any shape" }, colour.name())
        } else {
            let present = |shape| scene.objects.iter().any(|object| object.shape == shape);
            let shape = if yes {
                asked[draw.below(asked.len())].shape
            } else {
                self.absent(self.scenes.shapes(), present, draw)
            };
            format!("{} a {}?", if lone { "Is it" } else { "Is there" }, shape.name())
        };
        self.push(1.0, QuestionKind::YesNo, question, if yes { "yes" } else { "no" });
    }

    fn absent<T: Copy>(&self, all: &[T], present: impl Fn(T) -> bool, draw: &mut Draw) -> T {
        let absent: Vec<T> = all.iter().copied().filter(|item| !present(*item)).collect();
        draw.pick(&absent)
    }
}

/// Objects from top left to bottom right: "red circle top left, ring bottom right".
fn caption(scene: &Scene) -> String {
    let mut objects: Vec<_> = scene.objects.iter().collect();
    objects.sort_by_key(|object| object.quarter);
    let phrase = |object: &&Object| {
        let colour = object.colour.map(|colour| format!("{} ", colour.name())).unwrap_or_default();
        format!("{colour}{} {}", object.shape.name(), object.quarter.name())
    };
    objects.iter().map(phrase).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};

    use super::super::ScenesConfig;
    use super::*;

    fn scenes(split: Split) -> Scenes {
        let config = ScenesConfig { questions_per_image: 20, named_share: 0.3, ..ScenesConfig::default() };
        Scenes::new(config, split).unwrap()
    }

    #[test]
    fn answers_are_true() {
        for split in [Split::Train, Split::Unseen] {
            let scenes = scenes(split);
            for index in 0..1000 {
                let objects = scenes.scene(index).objects;
                for Question { kind, question, answer } in scenes.questions(index) {
                    // What the question names must single out one object; a lone object needs no name.
                    let meant: Vec<_> = objects
                        .iter()
                        .filter(|o| {
                            objects.len() == 1
                                || question.contains(o.shape.name())
                                || o.colour.is_some_and(|c| question.contains(&format!(" {}", c.name())))
                        })
                        .collect();
                    match kind {
                        QuestionKind::Colour => assert_eq!(meant[0].colour.unwrap().name(), answer),
                        QuestionKind::Shape => assert_eq!(meant[0].shape.name(), answer),
                        QuestionKind::Where => assert_eq!(meant[0].quarter.name(), answer),
                        QuestionKind::HowMany => assert_eq!(["one", "two", "three"][objects.len() - 1], answer),
                        QuestionKind::YesNo => {
                            let named = |o: &Object| {
                                question.contains(o.shape.name())
                                    || o.colour.is_some_and(|c| question.contains(c.name()))
                            };
                            assert_eq!(objects.iter().any(named), answer == "yes", "{question}");
                        }
                        QuestionKind::Caption => assert_eq!(answer.split(", ").count(), objects.len()),
                    }
                    if matches!(kind, QuestionKind::Colour | QuestionKind::Shape | QuestionKind::Where) {
                        assert_eq!(meant.len(), 1, "`{question}` in scene {index}");
                        assert!(!question.contains(&answer), "`{question}` holds its answer");
                    }
                }
            }
        }
    }

    #[test]
    fn training_text_never_joins_a_held_out_pair() {
        let scenes = scenes(Split::Train);
        for index in 0..2000 {
            for Question { question, answer, .. } in scenes.questions(index) {
                for (colour, shape) in &scenes.held_out {
                    assert!(!format!("{question} {answer}").contains(&format!("{} {}", colour.name(), shape.name())));
                }
            }
        }
    }

    #[test]
    fn unseen_asks_about_the_held_out_object_only() {
        let scenes = scenes(Split::Unseen);
        for index in 0..500 {
            let objects = scenes.scene(index).objects;
            for Question { kind, question, answer } in scenes.questions(index) {
                for other in &objects[1..] {
                    let names = |text: &str| text.contains(other.shape.name());
                    assert!(
                        kind == QuestionKind::Caption || !names(&question) && !names(&answer),
                        "{question} {answer}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_question_is_asked_once_and_yes_is_right_half_of_the_time() {
        let scenes = scenes(Split::Train);
        let mut yes = [0.0; 2];
        for index in 0..2000 {
            let questions = scenes.questions(index);
            assert_eq!(questions.iter().map(|q| &q.question).collect::<HashSet<_>>().len(), questions.len());
            for question in questions.iter().filter(|q| q.kind == QuestionKind::YesNo) {
                yes[usize::from(question.answer == "yes")] += 1.0;
            }
        }
        assert!((yes[1] / (yes[0] + yes[1]) - 0.5_f64).abs() < 0.03, "{yes:?}");
    }

    #[test]
    fn kinds_come_in_proportion_to_their_weights() {
        let kinds = BTreeMap::from([(QuestionKind::Where, 1.0), (QuestionKind::HowMany, 3.0)]);
        let config = ScenesConfig { questions_per_image: 1, kinds, ..ScenesConfig::default() };
        let scenes = Scenes::new(config, Split::Train).unwrap();
        let asked: Vec<_> = (0..2000).flat_map(|index| scenes.questions(index)).map(|q| q.kind).collect();
        let how_many = asked.iter().filter(|kind| **kind == QuestionKind::HowMany).count();
        assert!(asked.len() == 2000 && (1430..1570).contains(&how_many), "{how_many}");
    }

    #[test]
    fn questions_do_not_depend_on_how_many_are_asked() {
        let few = Scenes::new(ScenesConfig { questions_per_image: 2, ..ScenesConfig::default() }, Split::Test).unwrap();
        let many = Scenes::new(ScenesConfig::default(), Split::Test).unwrap();
        for index in 0..50 {
            assert_eq!(few.questions(index), many.questions(index)[..2]);
        }
    }
}
