# A stub, so that there are two extensions to build.
include "layout_constants.pxi"
