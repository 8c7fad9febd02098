//! ps-data.
