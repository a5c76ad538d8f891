//! The day, for templates that tell the model: `strftime_now`.

use std::fmt::{self, Display, Write as _};
use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970, in UTC.
pub(super) fn seconds_since_epoch() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The directives of `strftime` that templates use, in English and in UTC; others stay as they are.
pub(super) fn strftime(format: &str, seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day, day_of_year) = date(days);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let hour_of_twelve = (second / 3600 + 11) % 12 + 1;
    let mut out = Formatted::default();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.put(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.put(year),
            Some('y') => out.two(year % 100),
            Some('m') => out.two(month),
            Some('B') => out.put(month_name),
            Some('b') => out.put(&month_name[..3]),
            Some('d') => out.two(day),
            Some('j') => out.put(format_args!("{day_of_year:03}")),
            Some('A') => out.put(day_name),
            Some('a') => out.put(&day_name[..3]),
            Some('H') => out.two(second / 3600),
            Some('M') => out.two(second / 60 % 60),
            Some('S') => out.two(second % 60),
            Some('I') => out.two(hour_of_twelve),
            Some('p') => out.put(if second < 43_200 { "AM" } else { "PM" }),
            Some('e') => out.put(format_args!("{day:2}")),
            Some('F') => out.put(strftime("%Y-%m-%d", seconds)),
            Some('T') => out.put(strftime("%H:%M:%S", seconds)),
            Some('D') => out.put(strftime("%m/%d/%y", seconds)),
            Some('%') => out.put('%'),
            // glibc's `-`: no leading zero.
            Some('-') => match chars.next() {
                Some('d') => out.put(day),
                Some('m') => out.put(month),
                Some('H') => out.put(second / 3600),
                Some('M') => out.put(second / 60 % 60),
                Some('S') => out.put(second % 60),
                Some('I') => out.put(hour_of_twelve),
                Some('j') => out.put(day_of_year),
                Some(other) => out.put(format_args!("%-{other}")),
                None => out.put("%-"),
            },
            Some(other) => out.put(format_args!("%{other}")),
            None => out.put('%'),
        }
    }
    out.0
}

/// A string that is written to piece by piece.
#[derive(Default)]
struct Formatted(String);

impl Formatted {
    fn put(&mut self, piece: impl Display) {
        let written: fmt::Result = write!(self.0, "{piece}");
        written.expect("writing to a string does not fail");
    }

    fn two(&mut self, number: u64) {
        self.put(format_args!("{number:02}"));
    }
}

/// Year, month, day and day of the year (all but the year from 1) of a day since 1970.
fn date(mut days: u64) -> (u64, u64, u64, u64) {
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let day_of_year = days + 1;
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1, day_of_year)
}
