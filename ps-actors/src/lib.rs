//! ps-actors.
