//! Reads a plan from its text.

use std::str::FromStr;
use std::time::Duration;

use super::{Fault, MAX_PERCENT, Plan, UNITS};

/// A clause of a plan that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("clause {number}, `{clause}`: {reason}")]
pub struct PlanError {
    /// The position of the clause among all, from 1.
    pub number: usize,
    /// The text of the clause.
    pub clause: String,
    /// What is wrong with it, and how to write it.
    pub reason: String,
}

const ALL: &str = "a clause begins with kill, stop, lose, damage, drop, dup, delay or seed";

impl FromStr for Plan {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let mut plan = Self::default();
        let mut seen = Vec::new();
        for (index, clause) in text.split(';').enumerate() {
            let clause = clause.trim();
            // An end after the last clause, or no clause at all.
            if clause.is_empty() && text.split(';').count() == index + 1 {
                continue;
            }
            read_clause(clause, &mut plan, &mut seen).map_err(|reason| PlanError {
                number: index + 1,
                clause: clause.to_owned(),
                reason,
            })?;
        }
        Ok(plan)
    }
}

fn read_clause(clause: &str, plan: &mut Plan, seen: &mut Vec<&'static str>) -> Result<(), String> {
    let mut words = Words::of(clause);
    let mut once = |name: &'static str| match seen.contains(&name) {
        true => Err(format!("there is a `{name}` already")),
        false => {
            seen.push(name);
            Ok(())
        }
    };
    let example = match words.next() {
        Some("kill") => {
            let (fault, example) = kill(&mut words)?;
            plan.faults.push(fault);
            example
        }
        Some("stop") => {
            let (fault, example) = stop(&mut words)?;
            plan.faults.push(fault);
            example
        }
        Some("lose") => {
            let example = "lose power @ version 30";
            words.expect("power", example)?;
            let version = words.at("version", example)?;
            plan.faults.push(Fault::LosePower { version });
            example
        }
        Some("damage") => {
            let example = "damage checkpoint @ version 30";
            words.expect("checkpoint", example)?;
            let version = words.at("version", example)?;
            plan.faults.push(Fault::DamageCheckpoint { version });
            example
        }
        Some("drop") => {
            once("drop")?;
            let example = "drop 5%";
            plan.drop_percent = percent(words.some("a share", example)?, example)?;
            example
        }
        Some("dup") => {
            once("dup")?;
            let example = "dup 2%";
            plan.dup_percent = percent(words.some("a share", example)?, example)?;
            example
        }
        Some("delay") => {
            once("delay")?;
            let example = "delay 20..80ms";
            plan.delay = Some(delay(words.some("a range", example)?, example)?);
            example
        }
        Some("seed") => {
            once("seed")?;
            let example = "seed 7";
            plan.seed = Some(words.number("a seed", example)?);
            example
        }
        Some(_) => return Err(ALL.to_owned()),
        None => return Err(format!("it is empty; {ALL}")),
    };
    match words.next() {
        Some(more) => Err(write_as(&format!("`{more}` is too much"), example)),
        None => Ok(()),
    }
}

fn kill(words: &mut Words<'_>) -> Result<(Fault, &'static str), String> {
    const WORKER: &str = "kill worker 2 @ step 40";
    const SERVER: &str = "kill server 1 @ version 100";
    Ok(match words.next() {
        Some("worker") => {
            let worker = words.number("the worker's number", WORKER)?;
            let step = words.at("step", WORKER)?;
            (Fault::KillWorker { worker, step }, WORKER)
        }
        Some("server") => {
            let server = words.number("the server's number", SERVER)?;
            let version = words.at("version", SERVER)?;
            (Fault::KillServer { server, version }, SERVER)
        }
        other => return Err(instead("`worker` or `server`", other, WORKER)),
    })
}

fn stop(words: &mut Words<'_>) -> Result<(Fault, &'static str), String> {
    const WORKER: &str = "stop worker 1 for 3s @ step 10";
    const SERVER: &str = "stop server 0 for 500ms @ version 7";
    Ok(match words.next() {
        Some("worker") => {
            let worker = words.number("the worker's number", WORKER)?;
            words.expect("for", WORKER)?;
            let pause = duration(words.some("a duration", WORKER)?, WORKER)?;
            let step = words.at("step", WORKER)?;
            let fault = Fault::StopWorker {
                worker,
                pause,
                step,
            };
            (fault, WORKER)
        }
        Some("server") => {
            let server = words.number("the server's number", SERVER)?;
            words.expect("for", SERVER)?;
            let pause = duration(words.some("a duration", SERVER)?, SERVER)?;
            let version = words.at("version", SERVER)?;
            let fault = Fault::StopServer {
                server,
                pause,
                version,
            };
            (fault, SERVER)
        }
        other => return Err(instead("`worker` or `server`", other, WORKER)),
    })
}

/// The words of a clause. `@` is a word of its own, with or without spaces around it.
struct Words<'a> {
    words: std::vec::IntoIter<&'a str>,
}

impl<'a> Words<'a> {
    fn of(clause: &'a str) -> Self {
        let words = clause.split_whitespace().flat_map(|word| {
            let parts = word.split_inclusive('@');
            parts.flat_map(|part| match part.strip_suffix('@') {
                Some("") => vec!["@"],
                Some(before) => vec![before, "@"],
                None => vec![part],
            })
        });
        let words: Vec<&str> = words.collect();
        Self {
            words: words.into_iter(),
        }
    }

    fn next(&mut self) -> Option<&'a str> {
        self.words.next()
    }

    fn some(&mut self, what: &str, example: &str) -> Result<&'a str, String> {
        self.next().ok_or_else(|| instead(what, None, example))
    }

    fn expect(&mut self, word: &str, example: &str) -> Result<(), String> {
        match self.next() {
            Some(got) if got == word => Ok(()),
            other => Err(instead(&format!("`{word}`"), other, example)),
        }
    }

    fn number<T: FromStr>(&mut self, what: &str, example: &str) -> Result<T, String> {
        let word = self.some(what, example)?;
        let number = whole(word);
        number.ok_or_else(|| instead(what, Some(word), example))
    }

    /// Reads `@ step N` or `@ version N`.
    fn at(&mut self, unit: &str, example: &str) -> Result<u64, String> {
        self.expect("@", example)?;
        self.expect(unit, example)?;
        self.number("a number", example)
    }
}

/// Reads digits only: no sign, as `parse` alone would accept.
fn whole<T: FromStr>(word: &str) -> Option<T> {
    let is_whole = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
    is_whole.then(|| word.parse().ok()).flatten()
}

fn percent(word: &str, example: &str) -> Result<f64, String> {
    let Some(number) = word.strip_suffix('%') else {
        return Err(write_as(&format!("`{word}` has no percent sign"), example));
    };
    let is_plain = |text: &str| text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let share = number.parse().ok().filter(|_| is_plain(number));
    match share.filter(|share| (0.0..=MAX_PERCENT).contains(share)) {
        Some(share) => Ok(share),
        None => {
            let problem = format!("the share must be a number from 0 to {MAX_PERCENT}");
            Err(write_as(&problem, example))
        }
    }
}

fn delay(word: &str, example: &str) -> Result<(Duration, Duration), String> {
    let Some((from, to)) = word.split_once("..") else {
        return Err(instead("a range", Some(word), example));
    };
    let longest = duration(to, example)?;
    let shortest = match from.bytes().all(|byte| byte.is_ascii_digit()) {
        // The unit of the second number holds for both.
        true => {
            let unit = to.trim_start_matches(|c: char| c.is_ascii_digit());
            duration(&format!("{from}{unit}"), example)?
        }
        false => duration(from, example)?,
    };
    match shortest <= longest {
        true => Ok((shortest, longest)),
        false => Err(write_as(
            "the first delay is longer than the second",
            example,
        )),
    }
}

fn duration(word: &str, example: &str) -> Result<Duration, String> {
    let digits = word.len() - word.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = word.split_at(digits);
    let unit = UNITS.iter().find(|(name, _)| *name == unit);
    let micros = whole::<u64>(number).zip(unit);
    let micros = micros.and_then(|(number, (_, unit))| number.checked_mul(*unit));
    let units = "a whole number with us, ms, s or min";
    let micros = micros.ok_or_else(|| instead(units, Some(word), example))?;
    Ok(Duration::from_micros(micros))
}

fn instead(expected: &str, got: Option<&str>, example: &str) -> String {
    let problem = match got {
        Some(got) => format!("expected {expected} instead of `{got}`"),
        None => format!("expected {expected} at the end"),
    };
    write_as(&problem, example)
}

fn write_as(problem: &str, example: &str) -> String {
    format!("{problem}; write it as `{example}`")
}
