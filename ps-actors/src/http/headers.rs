//! The headers of the API, read and named.

use std::str::FromStr;

use axum::http::HeaderMap;

use super::problem::Problem;
use crate::ids::{Clock, GradientId, Incarnation, JoinRequest, Version, WorkerId};
use crate::server::PullVersion;

pub(super) const WORKER: &str = "ps-worker";
pub(super) const INCARNATION: &str = "ps-incarnation";
pub(super) const REQUEST: &str = "ps-request";
pub(super) const JOIN_AGAIN: &str = "ps-join-again";
pub(super) const CLOCK: &str = "ps-clock";
pub(super) const VERSION: &str = "ps-version";
pub(super) const EPOCH: &str = "ps-epoch";
pub(super) const LOSS: &str = "ps-loss";
pub(super) const NUM_EXAMPLES: &str = "ps-num-examples";
pub(super) const NUM_WEIGHTS: &str = "ps-num-weights";
pub(super) const OUTCOME: &str = "ps-outcome";
pub(super) const STALENESS: &str = "ps-staleness";

/// Reads which worker wants to join, and with which request.
pub(super) fn newcomer(headers: &HeaderMap) -> Result<(WorkerId, JoinRequest), Problem> {
    let worker = WorkerId(number(headers, WORKER)?);
    Ok((worker, JoinRequest(number(headers, REQUEST)?)))
}

/// The member that makes a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caller {
    pub(super) worker: WorkerId,
    pub(super) incarnation: Incarnation,
}

impl Caller {
    pub(super) fn read(headers: &HeaderMap) -> Result<Self, Problem> {
        Ok(Self {
            worker: WorkerId(number(headers, WORKER)?),
            incarnation: Incarnation(number(headers, INCARNATION)?),
        })
    }
}

/// What the headers of a push say about its gradient.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stamp {
    pub(super) id: GradientId,
    pub(super) computed_on: Version,
    pub(super) loss: f32,
    pub(super) num_examples: usize,
}

impl Stamp {
    pub(super) fn read(headers: &HeaderMap) -> Result<Self, Problem> {
        let Caller {
            worker,
            incarnation,
        } = Caller::read(headers)?;
        let id = GradientId {
            worker,
            incarnation,
            clock: Clock(number(headers, CLOCK)?),
        };
        Ok(Self {
            id,
            computed_on: Version(number(headers, VERSION)?),
            loss: number(headers, LOSS)?,
            num_examples: number(headers, NUM_EXAMPLES)?,
        })
    }
}

fn number<T: FromStr>(headers: &HeaderMap, name: &str) -> Result<T, Problem> {
    let mut values = headers.get_all(name).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        let why = format!("the request needs one header {name}");
        return Err(Problem::bad_request(why));
    };
    let number = value.to_str().ok().and_then(|text| text.parse().ok());
    number.ok_or_else(|| Problem::bad_request(format!("{name}: {value:?} is not such a number")))
}

/// Reads `version=latest`, `version=at-least:N` or `version=exactly:N`.
pub(super) fn wanted_version(query: Option<&str>) -> Result<PullVersion, Problem> {
    let Some(query) = query.filter(|query| !query.is_empty()) else {
        return Ok(PullVersion::Latest);
    };
    let number = |text: &str| text.parse().ok().map(Version);
    let wanted = query.strip_prefix("version=").and_then(|text| {
        if text == "latest" {
            return Some(PullVersion::Latest);
        }
        // Some clients write a colon as %3A, in either case.
        let text = text.replace("%3A", ":").replace("%3a", ":");
        let (how, which) = text.split_once(':')?;
        match how {
            "at-least" => number(which).map(PullVersion::AtLeast),
            "exactly" => number(which).map(PullVersion::Exactly),
            _ => None,
        }
    });
    wanted.ok_or_else(|| {
        let expected = "version=latest, version=at-least:N or version=exactly:N";
        Problem::bad_request(format!("the query {query:?} is none of {expected}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_documented() {
        let check = |query, expected| assert_eq!(wanted_version(query).ok(), expected, "{query:?}");
        check(None, Some(PullVersion::Latest));
        check(Some(""), Some(PullVersion::Latest));
        check(Some("version=latest"), Some(PullVersion::Latest));
        let exactly = PullVersion::Exactly(Version(7));
        check(Some("version=exactly:7"), Some(exactly));
        check(Some("version=exactly%3a7"), Some(exactly));
        let at_least = PullVersion::AtLeast(Version(u64::MAX));
        check(
            Some("version=at-least:18446744073709551615"),
            Some(at_least),
        );
        for bad in [
            "version",
            "version=7",
            "version=exactly:",
            "version=at-least:-1",
            "v=latest",
        ] {
            check(Some(bad), None);
        }
    }
}
