#!/bin/sh
# Installing a package starts nothing: no init system stands behind it. `service NAME start` still works.
exit 101
