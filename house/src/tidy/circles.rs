//! No circle among files.
//!
//! A module with children is a room: its own file is the sign, its children are the files. In every room an arrow from
//! anything in one child to anything in another is an arrow between the two children, each with all that lies in it
//! folded in; a circle of those is a fault. The sign is no part of its room's graph: it may name its files and they may
//! name it. Seen from outside, a room is one file. A module written inside its parent's file is a part of that file.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::arrows::Arrow;
use super::fault::{Fault, Rule};
use crate::sources::{ModuleId, Sources};

/// The arrows between the children of one room.
type Room<'a> = BTreeMap<(ModuleId, ModuleId), Vec<&'a Arrow>>;

/// Circles that share no arrow, the shortest first: each has to be broken by itself.
pub(super) fn check(sources: &Sources, arrows: &[Arrow]) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (room, mut between) in rooms(sources, arrows) {
        let whole = between.clone();
        while let Some(circle) = shortest(&between) {
            let mut fault = fault(sources, room, &circle, &between);
            let tangle = tangle(&whole, circle[0]);
            if tangle.len() > circle.len() {
                let names: Vec<&str> = tangle.iter().map(|module| sources.modules[*module].name.as_str()).collect();
                fault.what += &format!("\nin a tangle of {}: {}", names.len(), names.join(", "));
            }
            faults.push(fault);
            // It is told; what is left of the room may hold others.
            for (at, from) in circle.iter().enumerate() {
                between.remove(&(*from, circle[(at + 1) % circle.len()]));
            }
        }
    }
    faults
}

/// The rooms, by the module that is their sign.
fn rooms<'a>(sources: &Sources, arrows: &'a [Arrow]) -> BTreeMap<ModuleId, Room<'a>> {
    let mut rooms: BTreeMap<ModuleId, Room<'_>> = BTreeMap::new();
    for arrow in arrows {
        let Some(to) = sources.defined_in(&arrow.to) else { continue };
        let from = sources.line_of(sources.home(arrow.from));
        let to = sources.line_of(sources.home(to));
        let shared = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
        // Another crate shares nothing; between a sign and what lies in its room nothing differs.
        if let (1.., Some(a), Some(b)) = (shared, from.get(shared), to.get(shared)) {
            rooms.entry(from[shared - 1]).or_default().entry((*a, *b)).or_default().push(arrow);
        }
    }
    rooms
}

/// A shortest circle; among several the one that holds the earliest module.
fn shortest(room: &Room<'_>) -> Option<Vec<ModuleId>> {
    let starts: BTreeSet<ModuleId> = room.keys().map(|(from, _)| *from).collect();
    starts.into_iter().filter_map(|start| circle_through(room, start)).min_by_key(Vec::len)
}

/// The modules that one module can reach and be reached from.
fn tangle(room: &Room<'_>, module: ModuleId) -> Vec<ModuleId> {
    let reach = |start: ModuleId, forward: bool| {
        let mut seen = BTreeSet::from([start]);
        let mut waiting = vec![start];
        while let Some(at) = waiting.pop() {
            for (from, to) in room.keys() {
                let (from, to) = if forward { (from, to) } else { (to, from) };
                if *from == at && seen.insert(*to) {
                    waiting.push(*to);
                }
            }
        }
        seen
    };
    reach(module, true).intersection(&reach(module, false)).copied().collect()
}

fn circle_through(room: &Room<'_>, start: ModuleId) -> Option<Vec<ModuleId>> {
    let mut came_from = BTreeMap::new();
    let mut waiting = VecDeque::from([start]);
    while let Some(at) = waiting.pop_front() {
        for (_, to) in room.keys().filter(|(from, _)| *from == at) {
            if *to == start {
                let mut circle: Vec<_> = std::iter::successors(Some(at), |at| came_from.get(at).copied()).collect();
                circle.reverse();
                return Some(circle);
            }
            if !came_from.contains_key(to) {
                came_from.insert(*to, at);
                waiting.push_back(*to);
            }
        }
    }
    None
}

fn fault(sources: &Sources, room: ModuleId, circle: &[ModuleId], between: &Room<'_>) -> Fault {
    let name = |module: ModuleId| sources.modules[module].name.as_str();
    let round: Vec<&str> = circle.iter().chain(circle.first()).map(|module| name(*module)).collect();
    let mut what = format!("{}: {}", sources.path_of(room), round.join(" -> "));
    for (at, from) in circle.iter().enumerate() {
        let to = circle[(at + 1) % circle.len()];
        let arrows = &between[&(*from, to)];
        let first = arrows[0];
        let place = sources.place(first.from, first.line);
        what += &format!("\n{} -> {}  {place}  {}", name(*from), name(to), first.written);
        if arrows.len() > 1 {
            what += &format!(" (and {} more)", arrows.len() - 1);
        }
    }
    let sign = sources.modules[room].file.display().to_string();
    Fault { rule: Rule::Circles, place: sign, what }
}

#[cfg(test)]
mod tests {
    use super::super::arrows;
    use super::*;
    use crate::small::sources;

    fn circles(files: &[(&str, &str)]) -> Vec<String> {
        let sources = sources(files);
        let faults = check(&sources, &arrows::all(&sources).found);
        faults.into_iter().map(|fault| fault.what).collect()
    }

    #[test]
    fn a_circle_is_found_with_a_place_for_each_arrow() {
        let found = circles(&[
            ("one/lib.rs", "mod a; mod b; mod c; mod d;"),
            ("one/a.rs", "\nuse crate::b::B;\npub struct A;"),
            ("one/b.rs", "pub struct B(crate::c::C);"),
            ("one/c.rs", "pub struct C; pub struct D; fn f() { super::a::A; crate::a::A; }"),
            ("one/d.rs", "use crate::a::A; use crate::b::B;"),
        ]);
        let lines: Vec<&str> = found[0].lines().collect();
        assert_eq!(
            lines,
            [
                "one: a -> b -> c -> a",
                "a -> b  one/a.rs:2  crate::b::B",
                "b -> c  one/b.rs:1  crate::c::C",
                "c -> a  one/c.rs:1  super::a::A (and 1 more)",
            ]
        );
        assert_eq!(found.len(), 1);
    }

    #[test]
    fn tests_make_no_circle() {
        let files =
            |b| [("one/lib.rs", "mod a; mod b;"), ("one/a.rs", "use crate::b::B; pub struct A;"), ("one/b.rs", b)];
        assert!(circles(&files("pub struct B; #[cfg(test)] mod tests { use crate::a::A; }")).is_empty());
        assert_eq!(circles(&files("pub struct B; mod inner { use crate::a::A; }")).len(), 1);
    }

    #[test]
    fn reexports_are_followed() {
        // `a` names the crate's `X`, which is defined in `b`; the sign itself makes no circle.
        let files = |a| {
            [
                ("one/lib.rs", "mod a; mod b; pub use b::X; pub fn top() {}"),
                ("one/a.rs", a),
                ("one/b.rs", "use crate::a::Y; pub struct X;"),
            ]
        };
        assert_eq!(circles(&files("use crate::X; pub struct Y;")).len(), 1);
        assert_eq!(circles(&files("use super::*; pub struct Y(X);")).len(), 1);
        assert!(circles(&files("use crate::top; pub struct Y;")).is_empty());
        assert!(circles(&files("use super::*; pub struct Y;")).is_empty());
    }

    #[test]
    fn a_room_is_one_file_from_outside() {
        // room::x -> outer -> room::y: no file names itself, but the room does.
        let found = circles(&[
            ("one/lib.rs", "mod room; mod outer;"),
            ("one/room/mod.rs", "pub mod x; pub mod y;"),
            ("one/room/x.rs", "use crate::outer::O;"),
            ("one/room/y.rs", "pub struct Y;"),
            ("one/outer.rs", "use crate::room::y::Y; pub struct O;"),
        ]);
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("one: room -> outer -> room\nroom -> outer  one/room/x.rs:1"), "{}", found[0]);
    }

    #[test]
    fn circles_inside_a_room_are_found_and_its_sign_is_none_of_them() {
        let found = circles(&[
            ("one/lib.rs", "mod room;"),
            ("one/room.rs", "mod x; mod y; mod z; pub struct Sign; use x::X; use y::Y;"),
            ("one/room/x.rs", "use super::y::Y; use super::Sign; pub struct X;"),
            ("one/room/y.rs", "use super::X; pub struct Y;"),
            ("one/room/z.rs", "use super::x::X; use crate::room::Sign;"),
        ]);
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("one::room: x -> y -> x"), "{}", found[0]);
    }

    #[test]
    fn circles_that_share_no_arrow_are_all_told() {
        let found = circles(&[
            ("one/lib.rs", "mod a; mod b; mod c;"),
            ("one/a.rs", "use crate::{b::B, c::C}; pub struct A;"),
            ("one/b.rs", "use crate::a::A; pub struct B;"),
            ("one/c.rs", "use crate::a::A; pub struct C;"),
        ]);
        assert!(found[0].ends_with("in a tangle of 3: a, b, c"), "{}", found[0]);
        let heads: Vec<_> = found.iter().filter_map(|found| found.lines().next()).collect();
        assert_eq!(heads, ["one: a -> b -> a", "one: a -> c -> a"]);
    }
}
